// InfoNCE of a part of the anchors on CUDA.
#include "info_nce/info_nce_partial.h"

#include "cuda/registration.cuh"

namespace msacore::info_nce::cuda {
namespace {

[[noreturn]] void refuse(const char* op) { fail(op, "not implemented on CUDA"); }

void forward(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&, int64_t, PartialRows&) {
  refuse(op);
}
void positives(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&, int64_t, const Tensor&,
               const Tensor&, PartialRows&) {
  refuse(op);
}
void backward(const char* op, const InfoNceInputs&, const InfoNceSizes&, const InfoNceOptions&, int64_t,
              const PartialSaved&, PartialGradients&) {
  refuse(op);
}

using Operators = InfoNcePartialOperators<forward, positives, backward>;

}  // namespace
}  // namespace msacore::info_nce::cuda

MSACORE_CUDA_LIBRARY(m) {
  m.impl("info_nce_partial", TORCH_BOX(&msacore::info_nce::cuda::Operators::info_nce_partial));
  m.impl("info_nce_partial_positives", TORCH_BOX(&msacore::info_nce::cuda::Operators::info_nce_partial_positives));
  m.impl("info_nce_partial_backward", TORCH_BOX(&msacore::info_nce::cuda::Operators::info_nce_partial_backward));
}
