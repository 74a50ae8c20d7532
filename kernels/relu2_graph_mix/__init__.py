from .op import relu2_graph_mix as relu2_graph_mix
