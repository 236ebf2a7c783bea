// decode_attention: rows against the cache.
#include "cache.h"
#include "dispatch.h"

namespace river::ops {
namespace {

constexpr char kDecodeAttention[] =
    "(Tensor query, Tensor k_cache, Tensor v_cache, Tensor slots, Tensor positions, float? softmax_scale=None, "
    "int? sliding_window=None, Tensor? kv_valid=None) -> Tensor";

std::tuple<Tensor> decode_attention(Arguments<kDecodeAttention>& read) {
  const Tensor query = read.tensor("query");
  const CacheTensors cache = read_cache(read);
  Check check("decode_attention", "query", query);
  const ScalarType type = query.scalar_type();
  AttentionArgs args{};
  args.dtype = check.model_dtype("query", type);
  args.rows = check.many_rows("query", query, 3);
  args.num_heads = check.size("num_attention_heads of query", query.size(1));
  fill_cache(check, cache, type, args);
  args.query = check.vectors("query", query, type, {args.rows, args.num_heads, args.head_dim});
  fill_scores(check, cache, args);
  args.k_cache = data(cache.k_cache);
  args.v_cache = data(cache.v_cache);
  const Tensor out = check.output({args.rows, args.num_heads, args.head_dim}, type);
  args.out = mutable_data(out);
  launch(check, args, check_places<AttentionArgs>, cpu::launch_decode_attention, [&](auto& gpu) {
    cuda::launch_decode_attention(args, gpu.workspace(cuda::decode_attention_workspace(args)), gpu.stream());
  });
  return {out};
}

RIVER_OP(decode_attention, kDecodeAttention, boxed<&decode_attention>)

}  // namespace
}  // namespace river::ops
