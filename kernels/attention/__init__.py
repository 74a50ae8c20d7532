from .op import attention as attention
from .op import attention_varlen as attention_varlen
