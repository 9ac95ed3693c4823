// Private CUDA operators of the paged family: see ops_cuda.cpp.
#include "bindings/cuda.h"
#include "bindings/paged.h"
#include "cuda/paged/launch.h"
#include "cuda/paged/tiles.h"

namespace attnforge::cuda {
namespace {

// The sequences of (above, most] rows per KV head; parts and part_lses, fp32 [splits, B, rows, Hq,
// Dv] and [splits, B, Hq, rows], if their keys are split. by_sequence: parts lie by sequence and
// are added up here; else by row of q (B 1), and the caller adds up those of several calls. With
// split_pieces [3, splits], parts lie by piece (B 1), and sequences have theirs added up here.
void paged_fwd(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages, const Tensor& table,
               const Tensor& lengths, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
               const OptionalTensor& k_zero, const OptionalTensor& v_zero,
               const OptionalTensor& cu_seqlens_q, const OptionalTensor& alibi_slopes,
               const OptionalTensor& sinks, const OptionalTensor& mask, const Tensor& out,
               const Tensor& lse, const OptionalTensor& parts, const OptionalTensor& part_lses,
               const OptionalTensor& split_pieces, const OptionalTensor& split_first,
               int64_t max_seqlen_q, double softmax_scale, int64_t window_left,
               int64_t window_right, double softcap, int64_t above, int64_t most,
               int64_t split_keys, bool by_sequence, int64_t stream) {
  const int64_t capacity = table.size(1) * k_pages.size(1);
  STD_TORCH_CHECK(capacity < (int64_t{1} << 29),
                  "attnforge_native::cuda_paged_fwd: a row of the table has room for ", capacity,
                  " keys; less than 2^29 are counted");
  PagedFwdParams params =
      cpu::paged_fwd_params(q, k_pages, v_pages, table, lengths, {k_scale, v_scale, k_zero, v_zero},
                            cu_seqlens_q, alibi_slopes, sinks, mask, out, lse, max_seqlen_q,
                            capacity, {softmax_scale, window_left, window_right, softcap});
  const FlashProblem& p = params.flash.problem;
  if (empty(p)) return;
  check_aligned(q, "q"), check_aligned(out, "out");
  params.flash.q = ref(q, p.dtype), params.flash.out = ref(out, p.dtype);
  params.flash.lse = stat(lse);
  SplitParams splits;
  const Pieces pieces = cpu::pieces_of(split_pieces, split_first, p.batch);
  const bool planned = pieces.first != nullptr;
  if (parts) {
    STD_TORCH_CHECK(part_lses && parts->dim() == 5 && parts->size(3) == p.heads_q &&
                        parts->size(4) == p.v_head_dim &&
                        part_lses->numel() * p.v_head_dim == parts->numel() &&
                        parts->size(1) == (by_sequence && !planned ? p.batch : 1) &&
                        (!planned || parts->size(0) == pieces.count),
                    "attnforge_native::cuda_paged_fwd: parts and part_lses do not fit the call");
    splits.splits = parts->size(0), splits.keys = split_keys, splits.by_sequence = by_sequence;
    set_parts(splits, *parts, *part_lses, p);
  }
  STD_TORCH_CHECK(!planned || (parts && by_sequence),
                  "attnforge_native::cuda_paged_fwd: pieces need parts by sequence");
  const RowRange rows = {above, most};
  const bool latent = p.head_dim == kLatentDims.qk && p.v_head_dim == kLatentDims.v;
  STD_TORCH_CHECK(!latent || params.pool.k.data == params.pool.v.data,
                  "attnforge_native::cuda_paged_fwd: v_pages of latent attention must be the first "
                  "channels of k_pages");
  PagedFwdParams walked = params;
  if (planned) walked.flash.problem.sinks = nullptr;  // they join where pieces are added up
  check(with_dtype(p.dtype,
                   [&]<DType kDType>() {
                     const auto launch = latent                ? paged_latent<kDType>
                                         : most <= kDecodeMost ? paged_decode<kDType>
                                                               : paged_prefill<kDType>;
                     const int error = launch(walked, splits, pieces, rows, stream_of(stream));
                     if (error != 0 || !parts || !by_sequence) return error;
                     return paged_combine(params, splits, pieces, rows, parts->size(2),
                                          stream_of(stream));
                   }),
        "cuda_paged_fwd");
}

void append(const Tensor& k, const OptionalTensor& v, const Tensor& k_pages,
            const OptionalTensor& v_pages, const Tensor& table, const Tensor& lengths,
            const OptionalTensor& k_scale, const OptionalTensor& v_scale,
            const OptionalTensor& k_zero, const OptionalTensor& v_zero,
            const OptionalTensor& cu_seqlens, const OptionalTensor& rope_cos,
            const OptionalTensor& rope_sin, const OptionalTensor& positions, bool rope_interleaved,
            const OptionalTensor& page_min, const OptionalTensor& page_max, int64_t stream) {
  const PagedAppendParams p = cpu::paged_append_params(
      k, v, k_pages, v_pages, table, lengths, k_scale, v_scale, k_zero, v_zero, cu_seqlens,
      rope_cos, rope_sin, positions, rope_interleaved, page_min, page_max);
  if (p.batch > 0 && p.pool.pages > 0)
    check(paged_append(p, stream_of(stream)), "cuda_paged_append");
}

}  // namespace
}  // namespace attnforge::cuda

#define ATTNFORGE_CACHE                                                                          \
  "Tensor block_table, Tensor cache_seqlens, Tensor? k_scale, Tensor? v_scale, Tensor? k_zero, " \
  "Tensor? v_zero, "

STABLE_TORCH_LIBRARY_FRAGMENT(ATTNFORGE_NAMESPACE, m) {
  m.def("cuda_paged_fwd(Tensor q, Tensor k_pages, Tensor v_pages, " ATTNFORGE_CACHE
        "Tensor? cu_seqlens_q, Tensor? alibi_slopes, Tensor? sinks, Tensor? mask, Tensor(a!) out, "
        "Tensor(b!) lse, Tensor(c!)? parts, Tensor(d!)? part_lses, Tensor? split_pieces, Tensor? "
        "split_first, int max_seqlen_q, float softmax_scale, int window_left, int window_right, "
        "float softcap, int above, int most, int split_keys, bool by_sequence, int stream) -> ()");
  m.def(
      "cuda_paged_append(Tensor k, Tensor? v, Tensor(a!) k_pages, Tensor(b!)? "
      "v_pages, " ATTNFORGE_CACHE
      "Tensor? cu_seqlens, Tensor? rope_cos, Tensor? rope_sin, Tensor? positions, bool "
      "rope_interleaved, Tensor(c!)? page_min, Tensor(d!)? page_max, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, ATTNFORGE_KEY, m) {
  m.impl("cuda_paged_fwd", TORCH_BOX(&attnforge::cuda::paged_fwd));
  m.impl("cuda_paged_append", TORCH_BOX(&attnforge::cuda::append));
}
