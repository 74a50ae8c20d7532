// The functions of one instruction set, by the name of which its table is known.
#include "backward.h"
#include "chains.h"
#include "forward.h"

#define GLOMO_JOIN_(a, b) a##b
#define GLOMO_JOIN(a, b) GLOMO_JOIN_(a, b)
#define GLOMO_QUOTE_(a) #a
#define GLOMO_QUOTE(a) GLOMO_QUOTE_(a)

namespace glomo {

const Kernels GLOMO_JOIN(kernels_, GLOMO_ISA) = {
    GLOMO_QUOTE(GLOMO_ISA),
    GLOMO_ISA::W,
    GLOMO_ISA::forward_scratch,
    {GLOMO_ISA::forward<GLOMO_ISA::Relu2Weights>, GLOMO_ISA::forward<GLOMO_ISA::SoftmaxWeights>},
    GLOMO_ISA::backward_scratch,
    {GLOMO_ISA::backward<GLOMO_ISA::Relu2Gradient>, GLOMO_ISA::backward<GLOMO_ISA::SoftmaxGradient>},
    GLOMO_ISA::finish_query,
    GLOMO_ISA::affinity_scratch,
    GLOMO_ISA::affinity,
    GLOMO_ISA::affinity_backward_scratch,
    GLOMO_ISA::affinity_backward,
    GLOMO_ISA::mix_scratch,
    GLOMO_ISA::mix,
    GLOMO_ISA::mix_backward_scratch,
    GLOMO_ISA::mix_backward,
    GLOMO_ISA::chain_scratch,
    GLOMO_ISA::chain,
    GLOMO_ISA::chain_end_scratch,
    GLOMO_ISA::chain_out,
    GLOMO_ISA::chain_dsums,
    GLOMO_ISA::chain_backward_scratch,
    GLOMO_ISA::chain_backward,
    GLOMO_ISA::chain_dfeatures,
    GLOMO_ISA::write_sum,
};

}  // namespace glomo
