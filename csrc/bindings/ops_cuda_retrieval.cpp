// Private CUDA operators of the retrieval family: see ops_cuda.cpp.
#include "bindings/cuda.h"
#include "bindings/retrieval.h"
#include "cuda/retrieval/launch.h"

namespace attnforge::cuda {
namespace {

// parts and part_lses, fp32 [splits, B, Sq, Hq, Dv] and [splits, B, Hq, Sq], if lists are split:
// then out and lse are the caller's to fill from them.
void fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ids,
         const OptionalTensor& lens, const OptionalTensor& log_bias, const OptionalTensor& table,
         const OptionalTensor& used, const Tensor& out, const Tensor& lse,
         const OptionalTensor& out_lo, const OptionalTensor& parts, const OptionalTensor& part_lses,
         double softmax_scale, int64_t split_entries, int64_t stream) {
  const IndexedFwdParams params = cpu::indexed_fwd_params(q, k, v, ids, lens, log_bias, table, used,
                                                          softmax_scale, out, lse, out_lo);
  const FlashProblem& p = params.flash.problem;
  if (params.flash.out.data == nullptr) return;  // no rows
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v"), check_aligned(out, "out");
  constexpr int64_t kMost = int64_t{1} << 29;
  STD_TORCH_CHECK(
      params.lists.slots < kMost && p.seqlen_k < kMost,
      "attnforge_native::cuda_indexed_fwd: less than 2^29 keys and entries are counted");
  SplitParams splits;
  splits.keys = split_entries;
  if (parts) {
    STD_TORCH_CHECK(!out_lo && part_lses && parts->dim() == 5 && parts->size(1) == p.batch &&
                        parts->size(2) == p.seqlen_q && parts->size(3) == p.heads_q &&
                        parts->size(4) == p.v_head_dim &&
                        part_lses->numel() * p.v_head_dim == parts->numel(),
                    "attnforge_native::cuda_indexed_fwd: parts and part_lses do not fit the call");
    splits.splits = parts->size(0);
    set_parts(splits, *parts, *part_lses, p);
  }
  check(with_dtype(
            p.dtype,
            [&]<DType kDType>() { return indexed_fwd<kDType>(params, splits, stream_of(stream)); }),
        "cuda_indexed_fwd");
}

}  // namespace
}  // namespace attnforge::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ATTNFORGE_NAMESPACE, m) {
  m.def(
      "cuda_indexed_fwd(Tensor q, Tensor k, Tensor v, Tensor ids, Tensor? lens, Tensor? log_bias, "
      "Tensor? block_table, Tensor? cache_seqlens, Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? "
      "out_lo, Tensor(d!)? parts, Tensor(e!)? part_lses, float softmax_scale, int split_entries, "
      "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, ATTNFORGE_KEY, m) {
  m.impl("cuda_indexed_fwd", TORCH_BOX(&attnforge::cuda::fwd));
}
