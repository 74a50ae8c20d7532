"""How pytest runs the suite: which cases (`--grid`), in which order, what is left out because it stands in the results
file, and when a case is written there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from bench import results
from bench.cases import GRIDS, Case
from bench.flops import flops
from bench.measure import Replay
from bench.peak import peak_flops
from bench.peers import PEERS, YARDSTICKS
from bench.report import case_line, save, summary, table
from bench.running import Running


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--grid", choices=tuple(GRIDS), help="default: quick on a CPU, gpu on a GPU")
    group.addoption("--turns", type=int, default=3, help="how often the peers of a case take turns")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    group.addoption("--minutes", type=float, default=float("inf"), help="begin no case after that many minutes")
    group.addoption("--again", action="store_true", help="measure also what stands in the results file")
    group.addoption("--save", action="store_true", help="write results, table and pictures to bench/results/")
    group.addoption("--out", type=Path, help="the results file; default: .build/bench/<device>.jsonl")


class Session:
    """What the run knows: its circumstances, its file, and the case at hand."""

    def __init__(self, config: pytest.Config) -> None:
        torch.set_num_threads(config.getoption("threads"))
        self.device: str = config.getoption("device")
        self.now = results.circumstances(self.device)
        self.out = config.getoption("out") or results.working_file(self.now["device"])
        name = config.getoption("grid") or ("quick" if self.device == "cpu" else "gpu")
        self.cases = list(dict.fromkeys(GRIDS[name]()))
        self.turns: int = config.getoption("turns")
        self.deadline = time.monotonic() + 60 * config.getoption("minutes")
        self.running: Running | None = None
        self.clock = Replay()
        self._peaks: dict[str, float] = {}

    def run(self, case: Case) -> Running:
        if case.dtype not in self._peaks:
            self._peaks[case.dtype] = peak_flops(self.device, case.dtype)
        if self.running is None or self.running.case != case:
            self.running = None  # its tensors go before the next ones come
            self.running = Running(case, self.device)
        return self.running

    def facts(self, running: Running, peer: str) -> results.Row:
        """All that is needed to read a time alone: pytest-benchmark's extra_info."""
        case, measured = running.case, running.peers[peer]
        return {
            **{name: getattr(case, name) for name in ("op", "shape", "dtype", "direction", "length", "clusters")},
            "peer": peer,
            "backend": measured.backend,
            "yardstick": peer in YARDSTICKS.get(case.op, ()),
            "reason": measured.reason,
            "flops": flops(case),
            "bytes": running.bytes,
            "peak_memory": measured.memory,
            "peak_flops": self._peaks[case.dtype],
            "run": running.began,
            **self.now,
        }


SESSION = pytest.StashKey[Session]()


def pytest_configure(config):
    config.stash[SESSION] = Session(config)


def pytest_generate_tests(metafunc):
    """Case by case, turn by turn, peer by peer: a disturbance of the machine hits the peers of a case alike."""
    session = metafunc.config.stash[SESSION]
    found = [
        pytest.param(case, peer, turn, id=f"{case.id}-{peer}-{turn}")
        for case in session.cases
        for turn in range(session.turns)
        for peer in PEERS[case.op]
    ]
    metafunc.parametrize(("case", "peer", "turn"), found)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Takes out the cases of which every selected peer stands in the file. A case is measured whole or not at all: only
    times of one run are compared."""
    session = config.stash[SESSION]
    if session.device != "cpu":
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=session.clock))
    if config.getoption("again"):
        return
    done = results.done(results.read(session.out), session.now)
    missing = {i.callspec.params["case"].id for i in items if _key(i) not in done}
    kept = [i for i in items if i.callspec.params["case"].id in missing]
    config.hook.pytest_deselected(items=[i for i in items if i.callspec.params["case"].id not in missing])
    items[:] = kept


def _key(item):
    return item.callspec.params["case"].id, item.callspec.params["peer"]


def pytest_runtest_teardown(item, nextitem):
    """Writes a case once its last item has run."""
    session, config = item.config.stash[SESSION], item.config
    case = item.callspec.params["case"]
    if nextitem is not None and nextitem.callspec.params["case"] == case:
        return
    running, session.running = session.running, None
    if running is not None and running.case == case:
        found = [results.row(case.id, m.seconds, session.facts(running, peer)) for peer, m in running.peers.items()]
        results.append(session.out, found)
        with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            config.pluginmanager.get_plugin("terminalreporter").write_line(case_line(found))
    if nextitem is not None and time.monotonic() > session.deadline:
        item.session.shouldstop = "the time given by --minutes is over; the same command goes on from here"


def pytest_report_teststatus(report):
    """One line for a case (above) instead of a letter for every item."""
    if report.when == "call" and report.outcome != "failed":
        return report.outcome, "", ""
    return None


def pytest_terminal_summary(terminalreporter, config):
    """The table of the cases of this grid, from the file: what was measured now and what stood there. `--save` takes
    the other grids too that stand there, of the same sources."""
    session = config.stash[SESSION]
    ids = {case.id for case in session.cases}
    everything = [r for r in results.read(session.out) if results.same_circumstances(r, session.now)]
    rows = [r for r in everything if r["group"] in ids]
    if not rows:
        return
    terminalreporter.write_line(f"\n{table(rows)}\n\n{summary(rows)}\n")
    if config.getoption("save"):
        for path in save(everything, results.ROOT / "bench" / "results"):
            terminalreporter.write_line(f"wrote {path.relative_to(results.ROOT)}")


@pytest.fixture
def bench_session(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]
