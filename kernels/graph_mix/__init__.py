from .op import graph_mix as graph_mix
