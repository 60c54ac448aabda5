// Draws digits with a program of mpqdm-fx from C++: DDIM, one label a digit, no Python.
//
//   draw_digits PROGRAM.pte INPUTS.txt OUTPUT.f32
//
// PROGRAM takes sample float32 [B, 1, H, W], timestep int64 or float32 [B] and class_labels int64 [B],
// and returns the predicted noise. INPUTS is text, a word and its numbers on each line, as write_inputs.py beside
// this file writes them:
//
//   clip BOUND              predicted images are clipped to [-BOUND, BOUND]; without it they are not
//   labels L ...            B of them
//   noise X ...             B * H * W of them, the start
//   step TIMESTEP NOW NEXT  the cumulative alphas of this step and of the next, in running order
//
// OUTPUT is the images as bare float32 numbers; they are also drawn on the terminal.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "mpqdm/operators.h"

namespace {

using executorch::extension::from_blob;
using executorch::extension::Module;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "draw_digits: %s\n", what.c_str());
  std::exit(2);
}

struct Step {
  int64_t timestep;
  float now, next;  // cumulative alphas
};

struct Inputs {
  float bound = std::numeric_limits<float>::infinity();
  std::vector<int64_t> labels;
  std::vector<float> noise;
  std::vector<Step> steps;
};

template <class T>
std::vector<T> numbers(std::istream& line) {
  std::vector<T> values;
  for (T value; line >> value;) values.push_back(value);
  return values;
}

Inputs read_inputs(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail(path + " cannot be opened");
  Inputs inputs;
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string word;
    line >> word;
    if (word == "clip") {
      if (!(line >> inputs.bound) || !(inputs.bound > 0)) fail("clip lacks a number above 0: " + text);
    } else if (word == "labels") {
      inputs.labels = numbers<int64_t>(line);
    } else if (word == "noise") {
      inputs.noise = numbers<float>(line);
    } else if (word == "step") {
      Step step{};
      if (!(line >> step.timestep >> step.now >> step.next)) fail("a step lacks a number: " + text);
      inputs.steps.push_back(step);
    } else if (!word.empty()) {
      fail(path + " has a line that begins with " + word);
    }
  }
  if (inputs.steps.empty()) fail(path + " has no steps");
  return inputs;
}

// The program, and the shape of its images.
class Denoiser {
 public:
  explicit Denoiser(const std::string& path) : module_(path, Module::LoadMode::Mmap) {
    const auto meta = module_.method_meta("forward");
    if (!meta.ok()) fail(path + " is no program with a method forward");
    if (meta->num_inputs() != 3) fail(path + " does not take sample, timestep and class_labels");
    const auto sample = meta->input_tensor_meta(0), timestep = meta->input_tensor_meta(1);
    if (!sample.ok() || sample->sizes().size() != 4) fail(path + " takes no images");
    if (!timestep.ok()) fail(path + " takes no timestep");
    sizes_.assign(sample->sizes().begin(), sample->sizes().end());
    takes_float_ = timestep->scalar_type() == executorch::aten::ScalarType::Float;
  }

  const std::vector<int32_t>& sizes() const { return sizes_; }

  // Noise that the program sees in the sample, as long as the sample.
  std::vector<float> predict(std::vector<float>& sample, int64_t timestep,
                             std::vector<int64_t>& labels) {
    std::vector<int64_t> wholes(labels.size(), timestep);
    std::vector<float> floats(labels.size(), static_cast<float>(timestep));
    const auto batch = static_cast<int32_t>(labels.size());
    constexpr auto kLong = executorch::aten::ScalarType::Long;
    const auto timesteps = takes_float_ ? from_blob(floats.data(), {batch})
                                        : from_blob(wholes.data(), {batch}, kLong);
    const auto result = module_.forward({from_blob(sample.data(), sizes_), timesteps,
                                         from_blob(labels.data(), {batch}, kLong)});
    if (!result.ok()) fail("the program failed; ExecuTorch's log says why");
    const auto& noise = result->at(0).toTensor();
    if (static_cast<size_t>(noise.numel()) != sample.size()) fail("the program returns no noise");
    const float* data = noise.const_data_ptr<float>();
    return {data, data + noise.numel()};
  }

 private:
  Module module_;
  std::vector<int32_t> sizes_;
  bool takes_float_ = false;
};

// DDIM (arXiv 2010.02502), equation 12 with sigma = 0, in float32 and in the order of diffusers.
void step_back(const Step& step, float bound, const std::vector<float>& noise,
               std::vector<float>& sample) {
  const float now = std::sqrt(step.now), now_noise = std::sqrt(1.0f - step.now);
  const float next = std::sqrt(step.next), next_noise = std::sqrt(1.0f - step.next);
  for (size_t i = 0; i < sample.size(); ++i) {
    const float image = std::clamp((sample[i] - now_noise * noise[i]) / now, -bound, bound);
    sample[i] = next * image + next_noise * noise[i];
  }
}

void print(const std::vector<float>& images, const std::vector<int32_t>& sizes) {
  const std::string shades = " .:-=+*#%@";
  const auto width = static_cast<size_t>(sizes[3]);
  for (size_t i = 0; i < images.size(); ++i) {
    const float light = std::clamp((images[i] + 1.0f) / 2.0f, 0.0f, 1.0f);
    const auto shade = static_cast<size_t>(light * static_cast<float>(shades.size() - 1) + 0.5f);
    std::putchar(shades[shade]);
    std::putchar(shades[shade]);  // characters are twice as high as wide
    if ((i + 1) % width == 0) std::putchar('\n');
  }
}

void check(const Inputs& inputs, const std::vector<int32_t>& sizes) {
  size_t count = 1;
  for (const int32_t size : sizes) count *= static_cast<size_t>(size);
  if (inputs.labels.size() != static_cast<size_t>(sizes[0]) || inputs.noise.size() != count) {
    fail("the program draws " + std::to_string(sizes[0]) + " digits from " +
         std::to_string(count) + " numbers of noise; the inputs have " +
         std::to_string(inputs.labels.size()) + " labels and " +
         std::to_string(inputs.noise.size()) + " numbers");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: draw_digits PROGRAM.pte INPUTS.txt OUTPUT.f32");
  mpqdm_register_operators();  // names the library, so that linkers keep it
  Inputs inputs = read_inputs(argv[2]);
  Denoiser denoiser(argv[1]);
  check(inputs, denoiser.sizes());
  std::vector<float> sample = inputs.noise;
  for (const Step& step : inputs.steps) {
    step_back(step, inputs.bound, denoiser.predict(sample, step.timestep, inputs.labels), sample);
  }
  if (std::any_of(sample.begin(), sample.end(), [](float number) { return std::isnan(number); })) {
    fail("the program drew NaN, or a step has alphas outside 0 to 1");
  }
  print(sample, denoiser.sizes());
  std::ofstream output(argv[3], std::ios::binary);
  output.write(reinterpret_cast<const char*>(sample.data()),
               static_cast<std::streamsize>(sample.size() * sizeof(float)));
  if (!output.flush()) fail(std::string(argv[3]) + " cannot be written");
  return 0;
}
