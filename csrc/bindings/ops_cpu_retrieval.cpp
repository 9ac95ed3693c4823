// Private CPU operators of the retrieval family (namespace attnforge_native): see ops_cpu.cpp.
#include "bindings/lsh.h"

namespace attnforge::cpu {
namespace {

void indexed_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ids,
                 const OptionalTensor& lens, const OptionalTensor& log_bias,
                 const OptionalTensor& table, const OptionalTensor& used, double softmax_scale,
                 const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo) {
  IndexedFwdParams params = indexed_fwd_params(q, k, v, ids, lens, log_bias, table, used,
                                               softmax_scale, out, lse, out_lo);
  if (params.flash.out.data == nullptr) return;  // no rows
  Tensor scratch = workspace(kernels().indexed_fwd_workspace(params, workers().num_threads));
  params.flash.workspace = scratch.mutable_data_ptr();
  kernels().indexed_fwd(params, workers());
}

// The caller has zeroed dlog_bias.
void indexed_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
                 const Tensor& v, const Tensor& out, const Tensor& lse,
                 const OptionalTensor& out_lo, const Tensor& ids, const OptionalTensor& lens,
                 const OptionalTensor& log_bias, const OptionalTensor& used, double softmax_scale,
                 const Tensor& dq, const Tensor& dk, const Tensor& dv,
                 const OptionalTensor& dlog_bias) {
  IndexedBwdParams params =
      indexed_bwd_params(dout, dlse, q, k, v, out, lse, out_lo, ids, lens, log_bias, used,
                         softmax_scale, dq, dk, dv, dlog_bias);
  if (empty(params.flash.problem)) return;
  Tensor scratch = workspace(kernels().indexed_bwd_workspace(params, workers().num_threads));
  params.flash.workspace = scratch.mutable_data_ptr();
  kernels().indexed_bwd(params, workers());
}

// ---- scores and selection ----

void key_scores(const Tensor& q, const Tensor& k, const OptionalTensor& table,
                const OptionalTensor& used, const OptionalTensor& counts, double softmax_scale,
                const Tensor& out) {
  const KeyScoresParams params = key_scores_params(q, k, table, used, counts, softmax_scale, out);
  if (!empty(params.problem) && out.numel() > 0) kernels().key_scores(params, workers());
}

void page_scores(const Tensor& q, const Tensor& low, const Tensor& high,
                 const OptionalTensor& table, const OptionalTensor& used, double softmax_scale,
                 const Tensor& out) {
  const PageScoresParams params = page_scores_params(q, low, high, table, used, softmax_scale, out);
  if (out.numel() > 0) kernels().page_scores(params, workers());
}

void select_columns(const Tensor& scores, const OptionalTensor& used, int64_t kind, int64_t k,
                    const OptionalTensor& threshold, double mass, int64_t first, int64_t last,
                    const Tensor& ids, const Tensor& lens) {
  kernels().select_columns(
      select_params(scores, used, kind, k, threshold, mass, first, last, ids, lens), workers());
}

// ---- LSH ----

void lsh_encode(const Tensor& x, const OptionalTensor& mean, const Tensor& planes, int64_t bits,
                const Tensor& codes) {
  LshEncodeParams params = lsh_encode_params(x, mean, planes, bits, codes);
  if (codes.numel() == 0) return;
  Tensor scratch = workspace(kernels().lsh_encode_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().lsh_encode(params, workers());
}

void lsh_insert(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& codes,
                const Tensor& first, const Tensor& count) {
  const LshInsertParams params = lsh_insert_params(starts, ids, bits, codes, first, count);
  // A look-up goes to one bucket of every table: a page each, if pages are small.
  advise_huge_pages(starts, starts.numel() * starts.element_size());
  advise_huge_pages(ids, ids.numel() * ids.element_size());
  kernels().lsh_insert(params, workers());
}

void lsh_truncate(const Tensor& starts, const Tensor& ids, int64_t bits, const Tensor& length) {
  kernels().lsh_truncate(lsh_truncate_params(starts, ids, bits, length), workers());
}

void lsh_retrieve(const Tensor& starts, const Tensor& table_ids, int64_t bits, const Tensor& codes,
                  const Tensor& q, const Tensor& k, const OptionalTensor& mean, const Tensor& norms,
                  const Tensor& begin, const Tensor& end, int64_t min_hits, double clip,
                  const Tensor& ids, const Tensor& lens, const Tensor& log_bias) {
  LshRetrieveParams params = lsh_retrieve_params(starts, table_ids, bits, codes, q, k, mean, norms,
                                                 begin, end, min_hits, clip, ids, lens, log_bias);
  Tensor scratch = workspace(kernels().lsh_retrieve_workspace(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernels().lsh_retrieve(params, workers());
}

}  // namespace
}  // namespace attnforge::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def(
      "indexed_fwd(Tensor q, Tensor k, Tensor v, Tensor ids, Tensor? lens, Tensor? log_bias, "
      "Tensor? block_table, Tensor? cache_seqlens, float softmax_scale, Tensor(a!) out, "
      "Tensor(b!) lse, Tensor(c!)? out_lo) -> ()");
  m.def(
      "indexed_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, Tensor? out_lo, Tensor ids, Tensor? lens, Tensor? log_bias, Tensor? cache_seqlens, "
      "float softmax_scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dlog_bias) "
      "-> ()");
  m.def(
      "key_scores(Tensor q, Tensor k, Tensor? block_table, Tensor? cache_seqlens, Tensor? counts, "
      "float softmax_scale, Tensor(a!) out) -> ()");
  m.def(
      "page_scores(Tensor q, Tensor low, Tensor high, Tensor? block_table, Tensor? used, float "
      "softmax_scale, Tensor(a!) out) -> ()");
  m.def(
      "select_columns(Tensor scores, Tensor? used, int kind, int k, Tensor? threshold, float mass, "
      "int first, int last, Tensor(a!) ids, Tensor(b!) lens) -> ()");
  m.def("lsh_encode(Tensor x, Tensor? mean, Tensor planes, int bits, Tensor(a!) codes) -> ()");
  m.def(
      "lsh_insert(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor codes, Tensor first, Tensor "
      "count) -> ()");
  m.def("lsh_truncate(Tensor(a!) starts, Tensor(b!) ids, int bits, Tensor length) -> ()");
  m.def(
      "lsh_retrieve(Tensor starts, Tensor table_ids, int bits, Tensor codes, Tensor q, Tensor k, "
      "Tensor? mean, Tensor norms, Tensor begin, Tensor end, int min_hits, float clip, Tensor(a!) "
      "ids, Tensor(b!) lens, Tensor(c!) log_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("indexed_fwd", TORCH_BOX(&attnforge::cpu::indexed_fwd));
  m.impl("indexed_bwd", TORCH_BOX(&attnforge::cpu::indexed_bwd));
  m.impl("key_scores", TORCH_BOX(&attnforge::cpu::key_scores));
  m.impl("page_scores", TORCH_BOX(&attnforge::cpu::page_scores));
  m.impl("select_columns", TORCH_BOX(&attnforge::cpu::select_columns));
  m.impl("lsh_encode", TORCH_BOX(&attnforge::cpu::lsh_encode));
  m.impl("lsh_insert", TORCH_BOX(&attnforge::cpu::lsh_insert));
  m.impl("lsh_truncate", TORCH_BOX(&attnforge::cpu::lsh_truncate));
  m.impl("lsh_retrieve", TORCH_BOX(&attnforge::cpu::lsh_retrieve));
}
