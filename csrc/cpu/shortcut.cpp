// The shortest way from a Python call to an op; kernels/blip3o_kernels/shortcut.py tells the story. With shortcut.h this is all
// that knows Python.
//
// Each function takes what the op's public function takes, behind the instruction set, and returns its result, or None for
// everything out of the ordinary: then nothing has been done, and the ordinary way checks, explains and computes. Some return False
// where all is ordinary but for a gradient that is wanted.
#include "shortcut.h"

namespace {

#define ARGUMENTS Object, Object const *arguments, ptrdiff_t given

Object rms_norm(ARGUMENTS) {
  Call call(arguments, given, 6);
  blip3o_rms_norm_arguments a{};
  const View x = call.tensor(), weight = call.optional();
  a.eps = static_cast<float>(call.number(0.0)), a.offset = static_cast<float>(call.number(-FLT_MAX));
  a.round_before_weight = call.either(known->yes, known->no);
  call.require(dtype(x) >= 0 && dense(x) && x.dims);
  a.dtype = dtype(x), a.weight_dtype = shared_dtype(call, x, weight, weight), a.width = a.stride = last(x);
  call.require(row(weight, a.width, a.weight_dtype));
  if (call.stops()) return call.stopped();
  const Result y = like(arguments[1], x);
  if (!y.object) return nullptr;
  a.y = y.tensor.data, a.x = x.data, a.weight = weight.data, a.rows = count(x) / a.width;
  a.instruction_set = call.instruction_set, a.threads = call.threads(count(x));
  return finished(run(blip3o_cpu_rms_norm, a, count(x)), y.object);
}

Object add_rms_norm(ARGUMENTS) {
  Call call(arguments, given, 7);
  blip3o_add_rms_norm_arguments a{};
  const View x = call.tensor(), residual = call.tensor(), weight = call.optional();
  a.eps = static_cast<float>(call.number(0.0)), a.offset = static_cast<float>(call.number(-FLT_MAX));
  a.round_before_weight = call.either(known->yes, known->no);
  call.require(dtype(x) >= 0 && dense(x) && x.dims && alike(x, residual));
  a.dtype = dtype(x), a.weight_dtype = shared_dtype(call, x, weight, weight);
  a.width = a.stride = a.residual_stride = last(x);
  call.require(row(weight, a.width, a.weight_dtype));
  if (call.stops()) return call.stopped();
  const Result y = like(arguments[1], x), added = like(arguments[1], x);
  const Object pair[] = {y.object, added.object}, both = together(pair, 2);
  if (!both) return nullptr;
  a.y = y.tensor.data, a.added = added.tensor.data;
  a.x = x.data, a.residual = residual.data, a.weight = weight.data, a.rows = count(x) / a.width;
  a.instruction_set = call.instruction_set, a.threads = call.threads(count(x));
  return finished(run(blip3o_cpu_add_rms_norm, a, count(x)), both);
}

Object layer_norm(ARGUMENTS) {
  Call call(arguments, given, 5);
  blip3o_layer_norm_arguments a{};
  const View x = call.tensor(), weight = call.optional(), bias = call.optional();
  a.eps = static_cast<float>(call.number(0.0));
  call.require(dtype(x) >= 0 && dense(x) && x.dims);
  a.dtype = dtype(x), a.weight_dtype = shared_dtype(call, x, weight, bias), a.width = a.stride = last(x);
  call.require(row(weight, a.width, a.weight_dtype) && row(bias, a.width, a.weight_dtype));
  if (call.stops()) return call.stopped();
  a.rows = count(x) / a.width;
  const Result y = like(arguments[1], x), saved = call.saving ? floats(2 * a.rows) : Result(nullptr);
  const Object both[] = {y.object, saved.object}, result = call.saving ? together(both, 2) : y.object;
  if (!result) return nullptr;
  a.y = y.tensor.data, a.saved = static_cast<float*>(saved.tensor.data);
  a.x = x.data, a.weight = weight.data, a.bias = bias.data;
  a.instruction_set = call.instruction_set, a.threads = call.threads(count(x));
  return finished(run(blip3o_cpu_layer_norm, a, count(x)), result);
}

Object layer_norm_backward(ARGUMENTS) {  // dy, x, weight, bias, saved; both parameters given
  Call call(arguments, given, 6);
  blip3o_layer_norm_backward_arguments a{};
  const View dy = call.tensor(), x = call.tensor(), weight = call.tensor(), bias = call.tensor(), saved = call.tensor();
  call.require(dtype(x) >= 0 && dense(x) && x.dims && alike(x, dy));
  a.dtype = dtype(x), a.weight_dtype = shared_dtype(call, x, weight, bias), a.width = a.stride = last(x);
  call.require(row(weight, a.width, a.weight_dtype) && row(bias, a.width, a.weight_dtype));
  if (call.stops()) return nothing();
  a.rows = count(x) / a.width;
  a.blocks = a.rows < 64 ? 1 : a.rows / 32 > 64 ? 64 : a.rows / 32;  // as native_ops/layer_norm.py has it
  const Result dx = like(arguments[2], x), dweight = like(arguments[3], weight), dbias = like(arguments[4], bias);
  const Object all[] = {dx.object, dweight.object, dbias.object}, result = together(all, 3);
  if (!result) return nullptr;
  const Result workspace = floats(3 * a.blocks * a.width, true);
  if (!workspace.object) {
    Py_DecRef(result);
    return nullptr;
  }
  a.dx = dx.tensor.data, a.dweight = dweight.tensor.data, a.dbias = dbias.tensor.data;
  a.workspace = static_cast<float*>(workspace.tensor.data), a.dy = dy.data, a.x = x.data, a.weight = weight.data;
  a.saved = static_cast<const float*>(saved.data);
  a.instruction_set = call.instruction_set, a.threads = call.threads(count(x));
  const int status = run(blip3o_cpu_layer_norm_backward, a, count(x));
  Py_DecRef(workspace.object);
  return finished(status, result);
}

Object modulate(ARGUMENTS) {
  Call call(arguments, given, 8);
  blip3o_modulate_arguments a{};
  const View x = call.tensor(), scale = call.tensor(), shift = call.optional(), weight = call.optional();
  const View bias = call.optional();
  a.eps = static_cast<float>(call.number(0.0)), a.centred = call.either(known->layer, known->rms);
  call.require(dtype(x) >= 0 && x.dims == 3 && dense(x) && (a.centred || !bias.data));
  if (!call.fits) return nothing();
  a.batch = x.shape[0], a.tokens = x.shape[1], a.width = a.stride = x.shape[2];
  a.dtype = dtype(x), a.condition_dtype = shared_dtype(call, x, scale, scale);
  call.require(rows(scale, a.batch, a.width, a.condition_dtype) && rows(shift, a.batch, a.width, a.condition_dtype));
  call.require(row(weight, a.width, a.condition_dtype) && row(bias, a.width, a.condition_dtype));
  if (call.stops()) return call.stopped();
  const Result y = like(arguments[1], x);
  if (!y.object) return nullptr;
  a.y = y.tensor.data, a.x = x.data, a.scale = scale.data, a.shift = shift.data, a.weight = weight.data, a.bias = bias.data;
  a.scale_stride = scale.strides[0], a.shift_stride = shift.data ? shift.strides[0] : 0;
  a.instruction_set = call.instruction_set, a.threads = call.threads(count(x));
  return finished(run(blip3o_cpu_modulate, a, count(x)), y.object);
}

Object gated_residual(ARGUMENTS) {
  Call call(arguments, given, 6);
  blip3o_gated_residual_arguments a{};
  float saved[8192];
  const View residual = call.tensor(), x = call.tensor(), gate = call.tensor(), weight = call.optional();
  a.eps = static_cast<float>(call.number(0.0));
  call.require(dtype(x) >= 0 && x.dims == 3 && dense(x) && alike(x, residual));
  if (!call.fits) return nothing();
  a.batch = x.shape[0], a.tokens = x.shape[1], a.width = a.stride = a.residual_stride = x.shape[2];
  a.dtype = dtype(x), a.condition_dtype = shared_dtype(call, x, gate, gate);
  call.require(rows(gate, a.batch, a.width, a.condition_dtype) && row(weight, a.width, a.condition_dtype));
  call.require(a.batch * (a.width + a.tokens) <= 8192);
  if (call.stops()) return call.stopped();
  const Result y = like(arguments[2], x);
  if (!y.object) return nullptr;
  a.y = y.tensor.data, a.saved = saved, a.residual = residual.data, a.x = x.data, a.gate = gate.data, a.weight = weight.data;
  a.gate_stride = gate.strides[0];
  a.instruction_set = call.instruction_set, a.threads = call.threads(count(x));
  return finished(run(blip3o_cpu_gated_residual, a, count(x)), y.object);
}

Object rope(ARGUMENTS) {
  Call call(arguments, given, 5);
  blip3o_rope_arguments a{};
  const View x = call.tensor(), cos = call.tensor(), sin = call.tensor();
  a.interleaved = call.either(known->yes, known->no);
  call.require(dtype(x) >= 0 && x.dims == 4 && count(x) && x.strides[3] == 1 && dtype(cos) == BLIP3O_FLOAT32 && dense(cos));
  call.require(call.fits && alike(cos, sin) && (cos.dims == 2 || (cos.dims == 3 && cos.shape[0] == x.shape[0])));
  call.require(call.fits && cos.shape[cos.dims - 2] == x.shape[2] && 2 * last(cos) <= x.shape[3]);
  if (call.stops()) return nothing();
  const Result y = like(arguments[1], x);
  if (!y.object) return nullptr;
  a.y = y.tensor.data, a.x = x.data;
  a.cos = static_cast<const float*>(cos.data), a.sin = static_cast<const float*>(sin.data);
  a.batch = x.shape[0], a.heads = x.shape[1], a.tokens = x.shape[2], a.head_dim = x.shape[3], a.half = last(cos);
  a.table_stride = cos.dims == 3 ? a.tokens * a.half : 0;
  a.y_batch = y.tensor.strides[0], a.y_head = y.tensor.strides[1], a.y_token = y.tensor.strides[2];
  a.x_batch = x.strides[0], a.x_head = x.strides[1], a.x_token = x.strides[2];
  a.dtype = dtype(x), a.instruction_set = call.instruction_set, a.threads = call.threads(count(x));
  return finished(run(blip3o_cpu_rope, a, count(x)), y.object);
}

Object swiglu(ARGUMENTS) {
  Call call(arguments, given, 3);
  blip3o_swiglu_arguments a{};
  const View gate = call.tensor(), up = call.optional();
  const bool packed = !up.data;
  call.require(dtype(gate) >= 0 && dense(gate) && gate.dims);
  call.require(packed ? last(gate) % 2 == 0 : alike(gate, up));
  const int64_t elements = call.fits ? count(gate) / (1 + packed) : 0;
  call.require(elements * (gate.bits / 8) < LARGE || !packed);
  if (call.stops()) return call.stopped();
  int64_t shape[8];
  for (int i = 0; i < gate.dims; ++i) shape[i] = gate.shape[i];
  a.width = shape[gate.dims - 1] /= 1 + packed;
  const Result y = packed ? shaped(arguments[1], shape, gate.dims) : like(arguments[1], gate);
  if (!y.object) return nullptr;
  a.y = y.tensor.data, a.gate = gate.data, a.rows = elements / a.width, a.gate_stride = a.up_stride = last(gate);
  a.up = packed ? static_cast<const char*>(gate.data) + a.width * (gate.bits / 8) : up.data;
  a.dtype = dtype(gate), a.instruction_set = call.instruction_set, a.threads = call.threads(4 * elements);
  return finished(run(blip3o_cpu_swiglu, a, elements), y.object);
}

Object timestep_embedding(ARGUMENTS) {
  Call call(arguments, given, 4);
  blip3o_timestep_embedding_arguments a{};
  double frequencies[1024 + 15];
  const View timestep = call.tensor();
  const int64_t dim = call.integer(2048);
  a.max_period = call.number(FLT_MIN);
  call.require(dtype(timestep) == BLIP3O_FLOAT32 && timestep.dims == 1 && dense(timestep) && dim >= 2 && dim % 2 == 0);
  if (call.stops()) return nothing();
  const int64_t shape[2] = {timestep.shape[0], dim};
  const Result y = shaped(arguments[1], shape, 2);
  if (!y.object) return nullptr;
  a.y = static_cast<float*>(y.tensor.data), a.frequencies = frequencies;
  a.timestep = static_cast<const float*>(timestep.data), a.rows = shape[0], a.half = dim / 2;
  a.instruction_set = call.instruction_set, a.threads = call.threads(16 * a.rows * a.half);
  return finished(run(blip3o_cpu_timestep_embedding, a, a.rows * a.half), y.object);
}

Object flow_timesteps(ARGUMENTS) {
  Call call(arguments, given, 8);
  blip3o_flow_timesteps_arguments a{};
  const View positions = call.tensor();
  a.seed = call.integer(UINT64_MAX), a.logit_normal = call.either(known->logit_normal, known->uniform);
  a.mean = static_cast<float>(call.number(-FLT_MAX)), a.std = static_cast<float>(call.number(FLT_MIN));
  a.shift = static_cast<float>(call.number(FLT_MIN)), a.draw = static_cast<int>(call.integer((1 << 24) - 1));
  call.require(positions.dims == 1 && positions.type == 0 && positions.bits == 64 && dense(positions));
  if (call.stops()) return nothing();
  const Object tuple = PyTuple_New(1);
  if (!tuple) return nullptr;
  Py_IncRef(arguments[1]);
  PyTuple_SetItem(tuple, 0, arguments[1]);
  const Result sigma(PyObject_Call(known->empty_like, tuple, known->float32));
  Py_DecRef(tuple);
  if (!sigma.object) return nullptr;
  a.sigma = static_cast<float*>(sigma.tensor.data), a.positions = static_cast<const int64_t*>(positions.data);
  a.samples = count(positions), a.instruction_set = call.instruction_set, a.threads = call.threads(1 << 20);
  return finished(run(blip3o_cpu_flow_timesteps, a, a.samples), sigma.object);
}

Object flow_step(ARGUMENTS) {
  Call call(arguments, given, 7);
  blip3o_flow_step_arguments a{};
  const View x = call.tensor(), velocity = call.tensor();
  a.step = static_cast<float>(call.number(-FLT_MAX));
  const View unconditional = call.optional();
  a.guidance = static_cast<float>(call.number(-FLT_MAX));
  const View previous = call.optional();
  call.require(dtype(x) >= 0 && x.dims && dense(x) && alike(x, velocity));
  call.require((!unconditional.data || alike(x, unconditional)) && (!previous.data || alike(x, previous)));
  if (call.stops()) return nothing();
  const Result y = like(arguments[1], x);
  if (!y.object) return nullptr;
  a.y = y.tensor.data, a.x = x.data, a.velocity = velocity.data;
  a.unconditional = unconditional.data, a.previous = previous.data, a.samples = 1, a.elements = count(x);
  a.dtype = dtype(x), a.instruction_set = call.instruction_set, a.threads = call.threads(a.elements);
  return finished(run(blip3o_cpu_flow_step, a, a.elements), y.object);
}

Object qk_norm_rope(ARGUMENTS) {
  Call call(arguments, given, 13);
  blip3o_qk_norm_rope_arguments a{};
  const View query = call.tensor(), key = call.tensor(true), query_weight = call.tensor(), key_weight = call.tensor(true);
  const View query_bias = call.optional(), key_bias = call.optional(true), cos = call.tensor(), sin = call.tensor();
  a.eps = static_cast<float>(call.number(0.0)), a.centred = call.either(known->layer, known->rms);
  a.across_width = call.either(known->width, known->head), a.interleaved = call.either(known->yes, known->no);
  call.require(dtype(query) >= 0 && dtype(key) == dtype(query) && query.dims == 4 && key.dims == 4);
  call.require(dtype(cos) == BLIP3O_FLOAT32 && dense(cos) && alike(cos, sin));
  if (call.stops()) return nothing();
  a.batch = query.shape[0], a.heads = query.shape[1], a.tokens = query.shape[2], a.head_dim = query.shape[3];
  a.groups = key.shape[1], a.half = last(cos), a.table_stride = cos.dims == 3 ? a.tokens * a.half : 0;
  call.require(key.shape[0] == a.batch && key.shape[2] == a.tokens && key.shape[3] == a.head_dim);
  call.require((cos.dims == 2 || (cos.dims == 3 && cos.shape[0] == a.batch)) && cos.shape[cos.dims - 2] == a.tokens);
  call.require(2 * a.half <= a.head_dim && query.strides[3] == 1 && key.strides[3] == 1);
  call.require(!a.across_width || (query.strides[1] == a.head_dim && key.strides[1] == a.head_dim));
  a.dtype = dtype(query), a.parameter_dtype = dtype(query_weight);
  call.require(a.parameter_dtype == a.dtype || a.parameter_dtype == BLIP3O_FLOAT32);
  const auto parameter = [&](const View& p, int64_t heads) {
    const int64_t width = (a.across_width ? heads : 1) * a.head_dim;
    return p.dims == 1 && p.shape[0] == width && (p.strides[0] == 1 || width < 2) && dtype(p) == a.parameter_dtype;
  };
  call.require(parameter(query_weight, a.heads) && parameter(key_weight, a.groups));
  const auto none = [](const View& p) { return !p.data && !p.dims; };
  call.require(none(query_bias) || parameter(query_bias, a.heads));
  call.require(none(key_bias) || parameter(key_bias, a.groups));
  if (call.stops()) return nothing();
  const Result query_y = tokens_first(arguments[1], a.head_dim), key_y = tokens_first(arguments[2], a.head_dim);
  const Object both[] = {query_y.object, key_y.object}, result = together(both, 2);
  if (!result) return nullptr;
  a.query_y = query_y.tensor.data, a.key_y = key_y.tensor.data, a.query = query.data, a.key = key.data;
  a.query_weight = query_weight.data, a.key_weight = key_weight.data;
  a.query_bias = query_bias.data, a.key_bias = key_bias.data;
  a.cos = static_cast<const float*>(cos.data), a.sin = static_cast<const float*>(sin.data);
  a.query_batch = query.strides[0], a.query_head = query.strides[1], a.query_token = query.strides[2];
  a.key_batch = key.strides[0], a.key_head = key.strides[1], a.key_token = key.strides[2];
  const int64_t elements = count(query) + count(key);
  a.instruction_set = call.instruction_set, a.threads = call.threads(elements);
  return finished(run(blip3o_cpu_qk_norm_rope, a, elements), result);
}

// Of few queries, without a mask, a window, a softcap or packed sequences.
Object attention(ARGUMENTS) {
  Call call(arguments, given, 8);
  blip3o_attention_arguments a{};
  const View query = call.tensor(), key = call.tensor(), value = call.tensor();
  call.require(call.number(0.0) == 0.0);  // dropout
  a.left = -1, a.right = call.either(known->yes, known->no) ? 0 : -1;
  call.require(dtype(query) >= 0 && dtype(key) == dtype(query) && dtype(value) == dtype(query));
  call.require(query.dims == 4 && key.dims == 4 && value.dims == 4);
  if (call.stops()) return nothing();
  a.batch = query.shape[0], a.heads = query.shape[1], a.tokens = query.shape[2], a.head_dim = query.shape[3];
  a.groups = key.shape[1], a.keys = key.shape[2], a.value_dim = value.shape[3], a.sequences = 1;
  a.scale = static_cast<float>(call.number(-FLT_MAX, 1.0 / __builtin_sqrt(static_cast<double>(a.head_dim))));
  const bool shared = call.either(known->yes, known->no);
  call.require(key.shape[0] == a.batch && key.shape[3] == a.head_dim && (a.groups == a.heads || shared));
  call.require(value.shape[0] == a.batch && value.shape[1] == a.groups && value.shape[2] == a.keys);
  call.require(a.heads % a.groups == 0 && (a.tokens > 1 ? a.tokens : a.heads / a.groups) <= 16);
  call.require(query.strides[3] == 1 && key.strides[3] == 1 && value.strides[3] == 1);
  if (call.stops()) return nothing();
  const int64_t scores = a.batch * a.heads * a.tokens * a.keys, token = a.heads * a.head_dim;
  const bool dense = query.strides[0] == a.tokens * token && query.strides[1] == a.head_dim && query.strides[2] == token;
  const bool small = a.batch * a.tokens * token * (query.bits / 8) < LARGE;
  const Result y = dense && small && a.value_dim == a.head_dim ? like(arguments[1], query) : tokens_first(arguments[1], a.value_dim);
  if (!y.object) return nullptr;
  const int64_t widths = (a.head_dim + 31) / 32 * 32 + (a.value_dim + 31) / 32 * 32;
  a.threads = call.threads(scores), a.workspace_floats = 192 * widths + 4096;  // as native_ops/attention.py has it
  const int64_t rows[3] = {a.batch, a.heads, a.tokens};
  const Result log_sum = call.saving ? floats(rows, 3) : Result(nullptr);
  const Object both[] = {y.object, log_sum.object}, result = call.saving ? together(both, 2) : y.object;
  if (!result) return nullptr;
  const Result workspace = floats(a.threads * a.workspace_floats + (a.keys > 256 ? 512 * (a.value_dim + 33) : 0), true);
  if (!workspace.object) {
    Py_DecRef(result);
    return nullptr;
  }
  a.log_sum = static_cast<float*>(log_sum.tensor.data), a.log_sum_head = a.tokens, a.log_sum_token = 1;
  a.y = y.tensor.data, a.query = query.data, a.key = key.data, a.value = value.data;
  a.workspace = static_cast<float*>(workspace.tensor.data);
  a.y_batch = a.tokens * a.heads * a.value_dim, a.y_head = a.value_dim, a.y_token = a.heads * a.value_dim;
  a.query_batch = query.strides[0], a.query_head = query.strides[1], a.query_token = query.strides[2];
  a.key_batch = key.strides[0], a.key_head = key.strides[1], a.key_token = key.strides[2];
  a.value_batch = value.strides[0], a.value_head = value.strides[1], a.value_token = value.strides[2];
  a.dtype = dtype(query), a.instruction_set = call.instruction_set;
  const int status = run(blip3o_cpu_attention, a, scores * widths / 16);
  Py_DecRef(workspace.object);
  return finished(status, result);
}

struct Method {  // CPython's PyMethodDef
  const char* name;
  Object (*function)(ARGUMENTS);
  int flags;  // 0x80: METH_FASTCALL
  const char* documentation;
};

Method methods[] = {
    {"rms_norm", rms_norm, 0x80, nullptr},
    {"add_rms_norm", add_rms_norm, 0x80, nullptr},
    {"layer_norm", layer_norm, 0x80, nullptr},
    {"layer_norm_backward", layer_norm_backward, 0x80, nullptr},
    {"modulate", modulate, 0x80, nullptr},
    {"gated_residual", gated_residual, 0x80, nullptr},
    {"rope", rope, 0x80, nullptr},
    {"qk_norm_rope", qk_norm_rope, 0x80, nullptr},
    {"swiglu", swiglu, 0x80, nullptr},
    {"timestep_embedding", timestep_embedding, 0x80, nullptr},
    {"flow_timesteps", flow_timesteps, 0x80, nullptr},
    {"flow_step", flow_step, 0x80, nullptr},
    {"attention", attention, 0x80, nullptr},
};

}  // namespace

extern "C" void* blip3o_cpu_shortcut(const char* name, const void* handles) {
  known = static_cast<const Handles*>(handles);
  if (known->torch->major != 1 || !known->torch->tensor_from_object || !PyTuple_SetItem) return nullptr;
  for (Method& method : methods) {
    const char *a = method.name, *b = name;
    while (*a && *a == *b) ++a, ++b;
    if (*a == *b) return &method;
  }
  return nullptr;
}
