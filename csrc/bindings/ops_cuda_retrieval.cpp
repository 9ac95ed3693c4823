// Private CUDA operators of the retrieval family: see ops_cuda.cpp.
#include "bindings/cuda.h"
#include "bindings/lsh.h"
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

const int32_t* ints(const Tensor& t) {
  return data<int32_t>(OptionalTensor(t), ScalarType::Int);
}

// entries, starts: entries of a KV head by the key that they name; entry_k, entry_v: workspace.
// dlog_bias: one per row head, zeroed.
void bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
         const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo,
         const Tensor& ids, const OptionalTensor& lens, const OptionalTensor& log_bias,
         const OptionalTensor& used, const Tensor& entries, const Tensor& starts, const Tensor& dq,
         const Tensor& dk, const Tensor& dv, const OptionalTensor& dlog_bias, const Tensor& delta,
         const Tensor& entry_k, const Tensor& entry_v, double softmax_scale, int64_t stream) {
  IndexedBwdParams params =
      cpu::indexed_bwd_params(dout, dlse, q, k, v, out, lse, out_lo, ids, lens, log_bias, used,
                              softmax_scale, dq, dk, dv, dlog_bias);
  const FlashProblem& p = params.flash.problem;
  if (empty(p)) return;
  check_aligned(q, "q"), check_aligned(k, "k"), check_aligned(v, "v");
  check_aligned(dout, "dout"), check_aligned(dq, "dq");
  params.flash.delta = stat(delta);
  const int64_t all =
      p.batch * (params.lists.heads == p.heads_q ? p.heads_q : p.heads_k) * params.lists.slots;
  EntryGrads grads;
  grads.k = cpu::output<float>(entry_k, ScalarType::Float, all * p.head_dim);
  grads.v = cpu::output<float>(entry_v, ScalarType::Float, all * p.v_head_dim);
  grads.bias = params.dlog_bias;
  NamedRef named;
  named.entries = ints(entries), named.starts = ints(starts);
  named.heads = starts.dim() == 3 ? starts.size(1) : 0;
  STD_TORCH_CHECK((named.heads == 1 || named.heads == p.heads_k) && starts.size(0) == p.batch &&
                      starts.size(2) == p.seqlen_k + 1 &&
                      entries.numel() * p.heads_k == all * named.heads,
                  "attnforge_native::cuda_indexed_bwd: entries and starts are not of these lists");
  check(with_dtype(p.dtype,
                   [&]<DType kDType>() {
                     void* on = stream_of(stream);
                     if (const int error = flash_delta<kDType>(params.flash, on)) return error;
                     if (const int error = indexed_dq<kDType>(params, on)) return error;
                     if (const int error = indexed_dkdv<kDType>(params, grads, on)) return error;
                     return indexed_sum(params, grads, named, on);
                   }),
        "cuda_indexed_bwd");
}

void key_scores_of(const Tensor& q, const Tensor& k, const OptionalTensor& table,
                   const OptionalTensor& used, const OptionalTensor& counts, double softmax_scale,
                   const Tensor& out, int64_t stream) {
  const KeyScoresParams params =
      cpu::key_scores_params(q, k, table, used, counts, softmax_scale, out);
  if (empty(params.problem) || out.numel() == 0) return;
  check_aligned(q, "q"), check_aligned(k, "k");
  void* on = stream_of(stream);
  check(with_dtype(params.problem.dtype,
                   [&]<DType kDType>() {
                     const int error = key_scores<kDType>(params, on);
                     return error != 0 || params.counts == nullptr ? error : shares(params, on);
                   }),
        "cuda_key_scores");
}

void page_scores_of(const Tensor& q, const Tensor& low, const Tensor& high,
                    const OptionalTensor& table, const OptionalTensor& used, double softmax_scale,
                    const Tensor& out, int64_t stream) {
  const PageScoresParams params =
      cpu::page_scores_params(q, low, high, {}, table, used, softmax_scale, false, out);
  if (out.numel() == 0) return;
  check_aligned(low, "page_min"), check_aligned(high, "page_max");
  check(page_scores(params, stream_of(stream)), "cuda_page_scores");
}

void select(const Tensor& scores, const OptionalTensor& used, int64_t kind, int64_t k,
            const OptionalTensor& threshold, double mass, int64_t first, int64_t last,
            const Tensor& ids, const Tensor& lens, int64_t stream) {
  const SelectParams params =
      cpu::select_params(scores, used, kind, k, threshold, mass, first, last, ids, lens);
  STD_TORCH_CHECK(params.columns < (int64_t{1} << 30) && params.slots < (int64_t{1} << 30),
                  "attnforge_native::cuda_select_columns: less than 2^30 columns are counted");
  check(select_columns(params, stream_of(stream)), "cuda_select_columns");
}

void encode(const Tensor& x, const OptionalTensor& mean, const Tensor& planes, int64_t bits,
            const Tensor& codes, int64_t stream) {
  const LshEncodeParams params = cpu::lsh_encode_params(x, mean, planes, bits, codes);
  STD_TORCH_CHECK(bits > 0, "attnforge_native::cuda_lsh_encode: codes have a bit or more");
  if (codes.numel() > 0) check(lsh_encode(params, stream_of(stream)), "cuda_lsh_encode");
}

void insert(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& codes,
            const Tensor& first, const Tensor& count, int64_t stream) {
  const LshInsertParams params = cpu::lsh_insert_params(starts, ids, bits, codes, first, count);
  for (int64_t row = 0; row < params.rows; row += kInsertRows) {
    check(lsh_insert(params, row, stream_of(stream)), "cuda_lsh_insert");
  }
}

void truncate(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& length,
              int64_t stream) {
  check(lsh_truncate(cpu::lsh_truncate_params(starts, ids, bits, length), stream_of(stream)),
        "cuda_lsh_truncate");
}

// bits, counts: workspace, a bit per key of a segment and what of them is set, per query head.
void retrieve(const Tensor& starts, const Tensor& table_ids, int64_t bits, const Tensor& codes,
              const Tensor& q, const Tensor& k, const OptionalTensor& mean, const Tensor& norms,
              const Tensor& begin, const Tensor& end, int64_t min_hits, double clip,
              const Tensor& ids, const Tensor& lens, const Tensor& log_bias, const Tensor& marks,
              const Tensor& counts, int64_t stream) {
  const LshRetrieveParams params =
      cpu::lsh_retrieve_params(starts, table_ids, bits, codes, q, k, mean, norms, begin, end,
                               min_hits, clip, ids, lens, log_bias);
  check_aligned(q, "q"), check_aligned(k, "k");
  const LshTables& t = params.tables;
  const int64_t parts = params.problem.batch * params.problem.heads_q * t.segments;
  LshHits hits;
  hits.bits = cpu::output<uint32_t>(marks, ScalarType::Int, parts * ((t.segment + 31) / 32));
  hits.counts = cpu::output<int32_t>(counts, ScalarType::Int, parts);
  check(lsh_collect(params, hits, stream_of(stream)), "cuda_lsh_retrieve");
  check(lsh_weigh(params, stream_of(stream)), "cuda_lsh_retrieve");
}

}  // namespace
}  // namespace attnforge::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ATTNFORGE_NAMESPACE, m) {
  m.def(
      "cuda_indexed_fwd(Tensor q, Tensor k, Tensor v, Tensor ids, Tensor? lens, Tensor? log_bias, "
      "Tensor? block_table, Tensor? cache_seqlens, Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? "
      "out_lo, Tensor(d!)? parts, Tensor(e!)? part_lses, float softmax_scale, int split_entries, "
      "int stream) -> ()");
  m.def(
      "cuda_indexed_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor "
      "lse, Tensor? out_lo, Tensor ids, Tensor? lens, Tensor? log_bias, Tensor? cache_seqlens, "
      "Tensor entries, Tensor starts, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? "
      "dlog_bias, Tensor(e!) delta, Tensor(f!) entry_k, Tensor(g!) entry_v, float softmax_scale, "
      "int stream) -> ()");
  m.def(
      "cuda_key_scores(Tensor q, Tensor k, Tensor? block_table, Tensor? cache_seqlens, Tensor? "
      "counts, float softmax_scale, Tensor(a!) out, int stream) -> ()");
  m.def(
      "cuda_page_scores(Tensor q, Tensor low, Tensor high, Tensor? block_table, Tensor? used, "
      "float softmax_scale, Tensor(a!) out, int stream) -> ()");
  m.def(
      "cuda_select_columns(Tensor scores, Tensor? used, int kind, int k, Tensor? threshold, float "
      "mass, int first, int last, Tensor(a!) ids, Tensor(b!) lens, int stream) -> ()");
  m.def(
      "cuda_lsh_encode(Tensor x, Tensor? mean, Tensor planes, int bits, Tensor(a!) codes, int "
      "stream) -> ()");
  m.def(
      "cuda_lsh_insert(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor codes, Tensor first, "
      "Tensor count, int stream) -> ()");
  m.def(
      "cuda_lsh_truncate(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor length, int stream) "
      "-> ()");
  m.def(
      "cuda_lsh_retrieve(Tensor starts, Tensor table_ids, int bits, Tensor codes, Tensor q, Tensor "
      "k, Tensor? mean, Tensor norms, Tensor begin, Tensor end, int min_hits, float clip, "
      "Tensor(a!) ids, Tensor(b!) lens, Tensor(c!) log_bias, Tensor(d!) marks, Tensor(e!) counts, "
      "int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ATTNFORGE_NAMESPACE, ATTNFORGE_KEY, m) {
  m.impl("cuda_indexed_fwd", TORCH_BOX(&attnforge::cuda::fwd));
  m.impl("cuda_indexed_bwd", TORCH_BOX(&attnforge::cuda::bwd));
  m.impl("cuda_key_scores", TORCH_BOX(&attnforge::cuda::key_scores_of));
  m.impl("cuda_page_scores", TORCH_BOX(&attnforge::cuda::page_scores_of));
  m.impl("cuda_select_columns", TORCH_BOX(&attnforge::cuda::select));
  m.impl("cuda_lsh_encode", TORCH_BOX(&attnforge::cuda::encode));
  m.impl("cuda_lsh_insert", TORCH_BOX(&attnforge::cuda::insert));
  m.impl("cuda_lsh_truncate", TORCH_BOX(&attnforge::cuda::truncate));
  m.impl("cuda_lsh_retrieve", TORCH_BOX(&attnforge::cuda::retrieve));
}
