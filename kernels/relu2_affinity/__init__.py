from .op import relu2_affinity as relu2_affinity
