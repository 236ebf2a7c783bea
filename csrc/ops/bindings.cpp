// The module river_ext._C. Importing it registers the ops, which the other files of this folder hold; what it has
// itself are facts about the build and settings of the process.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>

#include "../cpu/graph.h"
#include "../cuda/read_ring.h"
#include "../cuda/runtime.h"
#include "../philox.h"
#include "../river.h"

namespace py = pybind11;
namespace cpu = river::cpu;
namespace cuda = river::cuda;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = RIVER_VERSION;
  info["cuda"] = bool(RIVER_WITH_CUDA);
  info["cuda_archs"] = RIVER_CUDA_ARCHS;
  info["cuda_note"] = RIVER_CUDA_NOTE;
  info["cpu_isa"] = cpu::isa();
  return info;
}

py::tuple cpu_isas() {
  py::list names;
  for (const char* const* name = cpu::supported_isas(); *name; name++) names.append(*name);
  return py::tuple(names);
}

void set_cpu_isa(const std::string& name) {
  if (!cpu::set_isa(name.c_str())) throw py::value_error("cpu isa '" + name + "' is not supported on this machine");
}

py::object gumbel(int64_t seed, int32_t position, py::array_t<int64_t> tokens) {
  return py::vectorize([&](int64_t token) { return river::gumbel(uint64_t(seed), position, token); })(tokens);
}

std::string set_overlap(const std::string& name) {
  static const char* const names[] = {"none", "launch", "prefetch"};  // in the order of cuda::Overlap
  const std::string before = names[int(cuda::overlap_setting)];
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw py::value_error("overlap is '" + name + "', expected none, launch or prefetch");
  cuda::overlap_setting = cuda::Overlap(found - names);
  return before;
}

py::dict variants() {
  py::dict values;
  for (const cuda::Variant& variant : cuda::kVariants) values[variant.name] = int(cuda::variants.*variant.value);
  return values;
}

void define_facts(py::module_& m) {
  m.attr("MAX_ROWS") = river::kMaxRows;
  m.attr("MAX_HEAD_DIM") = river::kMaxHeadDim;
  m.attr("MAX_GROUP") = river::kMaxGroup;
  m.attr("TILE_ROWS") = river::kTileRows;
  m.attr("TILE_COLS") = river::kTileCols;
  m.attr("TILE_BYTES") = river::kTileBytes;
  m.def("build_info", &build_info);
  m.def("cpu_isas", &cpu_isas, "Instruction sets this machine can run, best first");
  m.def("gumbel", &gumbel, "The noise of lm_head for token ids, fp32", py::arg("seed"), py::arg("position"),
        py::arg("tokens"));
  m.def("gumbel_of", py::vectorize([](uint32_t word) { return river::gumbel_of(word); }),
        "The noise that a random word gives, fp32", py::arg("word"));
}

void define_settings(py::module_& m) {
  m.def("set_cpu_isa", &set_cpu_isa,
        "Chooses the instruction set of the CPU kernels, for tests and measurements; not while an op runs");
  m.def("set_overlap", &set_overlap,
        "How much of this thread's CUDA kernels may happen before the kernels ahead of them end; returns what it was. "
        "At 'launch', the default, nothing is read early; at 'prefetch', weights are: they must be complete by then");
  m.def("variants", &variants,
        "Designs that are compared on hardware (csrc/cuda/variants.h), and which of the two each has: 0 or 1");
  m.def(
      "set_variant", [](const std::string& name, int value) { return int(cuda::set_variant(name, value)); },
      "Chooses a design for the whole process, for measurements; returns what it was. Results do not depend on it; a "
      "captured graph keeps what it was captured with",
      py::arg("name"), py::arg("value"));
}

// No finalizer runs while this lives, unless something loses its last reference: its ops would be captured.
class NoGarbageCollection {
 public:
  ~NoGarbageCollection() {
    if (before_) PyGC_Enable();
  }

 private:
  const int before_ = PyGC_Disable();
};

void define_graph(py::module_& m) {
  py::class_<cpu::Graph>(m, "Graph", "Calls of ops on a CPU that are captured once and run again, like a CUDA graph")
      .def(py::init<>())
      .def(
          "capture",
          [](cpu::Graph& graph, const py::function& run) {
            const NoGarbageCollection none;
            return graph.record(run);
          },
          "Calls run(), and returns what it returns; the ops that it calls on CPU tensors do not run, but are added to "
          "the graph with their tensors",
          py::arg("run"))
      .def_property_readonly(
          "is_capturing", [](const cpu::Graph& graph) { return cpu::Graph::recording() == &graph; },
          "Whether this thread is in a call of capture()")
      .def("__len__", &cpu::Graph::size, "How many ops it has")
      .def(
          "replay",
          [](const cpu::Graph& graph, size_t begin, size_t end) { graph.replay(begin, end, cpu::callers_threads()); },
          py::call_guard<py::gil_scoped_release>(),
          "Runs ops begin to end - 1 on what their tensors hold now; not by two threads at once", py::arg("begin"),
          py::arg("end"));
}

#if RIVER_WITH_CUDA
py::dict cuda_image() {
  const cuda::Image& image = cuda::image();
  py::dict facts;
  facts["device"] = image.device;
  facts["code"] = image.code ? py::object(py::int_(image.code)) : py::none();
  facts["ptx"] = image.code ? py::object(py::int_(image.ptx)) : py::none();
  return facts;
}

void read_ring(uintptr_t data, int64_t bytes, int stage_bytes, int copy_bytes, int stages, int blocks_per_sm,
               uintptr_t checksums, uintptr_t stream) {
  const river::ReadRingArgs args = {.bytes = bytes,
                                    .stage_bytes = stage_bytes,
                                    .copy_bytes = copy_bytes,
                                    .stages = stages,
                                    .blocks_per_sm = blocks_per_sm,
                                    .data = reinterpret_cast<const uint8_t*>(data),
                                    .checksums = reinterpret_cast<uint32_t*>(checksums)};
  const cuda::Workspace workspace = {.partials = nullptr,
                                     .counters = nullptr,
                                     .scratch = nullptr,
                                     .blocks = cuda::sm_count(),
                                     .overlap = cuda::overlap_setting,
                                     .variants = cuda::variants};
  cuda::launch_read_ring(args, workspace, reinterpret_cast<cuda::Stream>(stream));
}

void define_gpu(py::module_& m) {
  m.def("cuda_image", &cuda_image,
        "Of the current GPU: its architecture, that of the machine code it runs (None: this build has none for it), "
        "and that of the PTX behind it");
  m.def("read_ring", &read_ring,
        "Reads memory of the current GPU through the ring that streams weights, for measurements "
        "(csrc/cuda/read_ring.h)",
        py::kw_only(), py::arg("data"), py::arg("bytes"), py::arg("stage_bytes"), py::arg("copy_bytes"),
        py::arg("stages"), py::arg("blocks_per_sm"), py::arg("checksums"), py::arg("stream"));
}
#else
void define_gpu(py::module_&) {}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.river.* and holds facts about the build.";
  define_facts(m);
  define_settings(m);
  define_graph(m);
  define_gpu(m);
}
