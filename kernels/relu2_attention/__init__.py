from .op import relu2_attention as relu2_attention
from .op import relu2_attention_varlen as relu2_attention_varlen
