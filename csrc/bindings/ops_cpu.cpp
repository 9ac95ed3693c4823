// Private CPU operators (namespace attnforge_native) over the torch-free kernels: unpack tensors
// into params structs, lend torch's thread pool and a workspace, call. LibTorch stable ABI only.
#include <chrono>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "bindings/flash_routes.h"
#include "bindings/mods.h"
#include "bindings/tensors.h"

namespace attnforge::cpu {
namespace {

using Tiles = std::vector<int64_t>;

// The list `tiles` of a launcher into the named fields of the operator; empty leaves all of them.
void set_tiles(const Tiles& tiles, std::initializer_list<int64_t*> fields) {
  STD_TORCH_CHECK(tiles.empty() || tiles.size() == fields.size(),
                  "attnforge_native: tiles must be empty or have ", fields.size(), " entries");
  size_t i = 0;
  for (int64_t* field : fields) {
    if (tiles.empty()) return;
    STD_TORCH_CHECK(tiles[i] >= 0 && tiles[i] <= int64_t{1} << 40,
                    "attnforge_native: tiles must not be negative or huge");
    *field = tiles[i++];
  }
}

template <class Params>
void run(int64_t (*size)(const Params&, int64_t), void (*kernel)(const Params&, const Workers&),
         Params& params) {
  Tensor scratch = workspace(size(params, workers().num_threads));
  params.workspace = scratch.mutable_data_ptr();
  kernel(params, workers());
}

void flash_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
               const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
               const OptionalTensor& sinks, const Tensor& out, const Tensor& lse,
               const OptionalTensor& out_lo, int64_t max_seqlen_q, int64_t max_seqlen_k,
               double softmax_scale, int64_t window_left, int64_t window_right, double softcap,
               const std::vector<OptionalTensor>& mods, const std::string& score_fn,
               double dropout_p, bool rope_interleaved, const Tiles& tiles) {
  FlashFwdParams params;
  FlashTiles& t = params.tiles;
  set_tiles(tiles, {&t.block_m, &t.block_n, &t.wave_bytes});
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap, true});
  p.mods = flash_mods(p, {mods, score_fn, dropout_p, rope_interleaved});
  zero_tail(out, p.cu_seqlens_q, p.batch);
  if (out_lo) zero_tail(*out_lo, p.cu_seqlens_q, p.batch);
  fill_tail(lse, p.cu_seqlens_q, p.batch, -std::numeric_limits<float>::infinity());
  if (empty(p)) return;
  large(out);
  if (p.dtype == DType::kFloat8) p.out_dtype = dtype_of(out);
  params.q = ref(q, p.q_dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.out_dtype), params.out_lo = ref(out_lo, p.out_dtype);
  params.lse = stat(lse);
  run_flash_routes(params, [&](auto size, auto kernel) { run(size, kernel, params); });
}

void flash_decode(const Tensor& q, const Tensor& k, const Tensor& v,
                  const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
                  const OptionalTensor& sinks, const Tensor& out, const Tensor& lse,
                  double softmax_scale, int64_t window_left, int64_t window_right, double softcap,
                  const std::vector<OptionalTensor>& mods, const std::string& score_fn,
                  double dropout_p, bool rope_interleaved, int64_t num_splits, const Tiles& tiles) {
  FlashFwdParams params;
  set_tiles(tiles, {&params.tiles.split_keys, &params.tiles.chunk_keys});
  FlashProblem& p = params.problem;
  p = problem(q, k, v, std::nullopt, std::nullopt, seqused_k, alibi_slopes, sinks, q.size(1),
              k.size(1), {softmax_scale, window_left, window_right, softcap, true});
  p.mods = flash_mods(p, {mods, score_fn, dropout_p, rope_interleaved});
  if (empty(p)) return;
  if (p.dtype == DType::kFloat8) p.out_dtype = dtype_of(out);
  params.q = ref(q, p.q_dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.out_dtype);
  params.lse = stat(lse);
  if (num_splits > 0)
    params.split_keys = std::max<int64_t>(1, (p.seqlen_k + num_splits - 1) / num_splits);
  run(kernels().flash_decode_workspace, kernels().flash_decode, params);
}

void flash_bwd(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& out_lo,
               const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
               const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
               const OptionalTensor& sinks, const Tensor& dq, const Tensor& dk, const Tensor& dv,
               const Tensor& delta, int64_t max_seqlen_q, int64_t max_seqlen_k,
               double softmax_scale, int64_t window_left, int64_t window_right, double softcap,
               const std::vector<OptionalTensor>& mods, const std::string& score_fn,
               double dropout_p, bool rope_interleaved, const Tiles& tiles,
               const OptionalTensor& dcolumns, const OptionalTensor& drows,
               const OptionalTensor& dbias, const OptionalTensor& drel_bias,
               const OptionalTensor& drow_scale) {
  FlashBwdParams params;
  FlashTiles& t = params.tiles;
  set_tiles(tiles, {&t.block_m, &t.block_n, &t.chunks});
  FlashProblem& p = params.problem;
  p = problem(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, alibi_slopes, sinks, max_seqlen_q,
              max_seqlen_k, {softmax_scale, window_left, window_right, softcap});
  p.mods = flash_mods(p, {mods, score_fn, dropout_p, rope_interleaved});
  zero_tail(dq, p.cu_seqlens_q, p.batch);
  zero_tail(dk, p.cu_seqlens_k, p.batch);
  zero_tail(dv, p.cu_seqlens_k, p.batch);
  fill_tail(delta, p.cu_seqlens_q, p.batch, 0.0f);
  if (empty(p)) return;
  large(dq, dk, dv);
  params.dout = ref(dout, p.dtype);
  params.q = ref(q, p.dtype), params.k = ref(k, p.dtype), params.v = ref(v, p.dtype);
  params.out = ref(out, p.dtype), params.out_lo = ref(out_lo, p.dtype);
  params.dq = ref(dq, p.dtype), params.dk = ref(dk, p.dtype), params.dv = ref(dv, p.dtype);
  params.lse = stat(lse);
  if (dlse) params.dlse = stat(*dlse);
  params.delta = stat(delta);
  set_mod_grads(params, {dcolumns, drows, dbias, drel_bias, drow_scale});
  run(kernels().flash_bwd_workspace, kernels().flash_bwd, params);
}

void merge_states(const Tensor& outs, const Tensor& lses, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(
      (outs.dim() == 4 || outs.dim() == 5) && lses.dim() == outs.dim() - 1 &&
          outs.is_contiguous() && lses.is_contiguous() && out.is_contiguous() &&
          lse.is_contiguous() && dtype_of(out) == dtype_of(outs) &&
          lses.scalar_type() == ScalarType::Float,
      "attnforge_native: merge_states wants contiguous [N, B, S, H, D] and [N, B, H, S]");
  MergeParams params;
  bool batched = outs.dim() == 5;
  int64_t s = batched ? 2 : 1;
  params.dtype = dtype_of(outs);
  params.states = outs.size(0);
  params.batch = batched ? outs.size(1) : 1;
  params.seqlen = outs.size(s);
  params.heads = outs.size(s + 1);
  params.dim = outs.size(s + 2);
  STD_TORCH_CHECK(lses.numel() == params.states * params.batch * params.seqlen * params.heads &&
                      out.numel() * params.states == outs.numel() &&
                      lse.numel() * params.states == lses.numel(),
                  "attnforge_native: merge_states got tensors that differ in shape");
  params.outs = outs.const_data_ptr();
  params.lses = static_cast<const float*>(lses.const_data_ptr());
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  kernels().merge_states(params, workers());
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// GB/s of streaming `buffer` once with all threads.
double probe_read(const Tensor& buffer) {
  int64_t bytes = buffer.numel() * buffer.element_size();
  auto start = std::chrono::steady_clock::now();
  kernels().probe_read(workers(), buffer.const_data_ptr(), bytes);
  return static_cast<double>(bytes) / seconds_since(start) * 1e-9;
}

// GFLOP/s of `iterations` register tiles per thread on operands in L1.
double probe_fma(int64_t iterations) {
  auto start = std::chrono::steady_clock::now();
  double flops = kernels().probe_fma(workers(), iterations);
  return flops / seconds_since(start) * 1e-9;
}

std::string cpu_isa(std::string name) {
  if (!name.empty()) {
    STD_TORCH_CHECK(select_isa(name.c_str()), "attnforge: CPU ISA level '", name,
                    "' is unknown or does not run here; levels: auto,", isa_levels());
  }
  return kernels().isa;
}

std::string cpu_isa_levels() {
  return isa_levels();
}

}  // namespace
}  // namespace attnforge::cpu

#define ATTNFORGE_SCORES                                                                        \
  "float softmax_scale, int window_left, int window_right, float softcap, Tensor?[] mods, str " \
  "score_fn, float dropout_p, bool rope_interleaved"
#define ATTNFORGE_EXTRAS                                                                          \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? alibi_slopes, Tensor? " \
  "sinks, "
#define ATTNFORGE_TILES ", int[] tiles"
#define ATTNFORGE_LENGTHS "int max_seqlen_q, int max_seqlen_k, "

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def("flash_fwd(Tensor q, Tensor k, Tensor v, " ATTNFORGE_EXTRAS
        "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? out_lo, " ATTNFORGE_LENGTHS
            ATTNFORGE_SCORES ATTNFORGE_TILES ") -> ()");
  m.def(
      "flash_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? out_lo, " ATTNFORGE_EXTRAS
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) "
      "delta, " ATTNFORGE_LENGTHS ATTNFORGE_SCORES ATTNFORGE_TILES
      ", Tensor(e!)? dcolumns=None, Tensor(f!)? drows=None, Tensor(g!)? dbias=None, "
      "Tensor(h!)? drel_bias=None, Tensor(i!)? drow_scale=None) -> ()");
  m.def(
      "flash_decode(Tensor q, Tensor k, Tensor v, Tensor? seqused_k, Tensor? alibi_slopes, "
      "Tensor? sinks, Tensor(a!) out, Tensor(b!) lse, " ATTNFORGE_SCORES
      ", int num_splits" ATTNFORGE_TILES ") -> ()");
  m.def("merge_states(Tensor outs, Tensor lses, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("probe_read(Tensor buffer) -> float");
  m.def("probe_fma(int iterations) -> float");
  m.def("cpu_isa(str name) -> str");
  m.def("cpu_isa_levels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CPU, m) {
  m.impl("flash_fwd", TORCH_BOX(&attnforge::cpu::flash_fwd));
  m.impl("flash_bwd", TORCH_BOX(&attnforge::cpu::flash_bwd));
  m.impl("flash_decode", TORCH_BOX(&attnforge::cpu::flash_decode));
  m.impl("merge_states", TORCH_BOX(&attnforge::cpu::merge_states));
  m.impl("probe_read", TORCH_BOX(&attnforge::cpu::probe_read));
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CompositeExplicitAutograd, m) {
  m.impl("probe_fma", TORCH_BOX(&attnforge::cpu::probe_fma));
  m.impl("cpu_isa", TORCH_BOX(&attnforge::cpu::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&attnforge::cpu::cpu_isa_levels));
}
