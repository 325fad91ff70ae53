#include "bus_errors.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace partinfer {
namespace {

constexpr int MOST = 1024;
constexpr char MESSAGE[] =
    "error: a file that weights are mapped from was cut off, or can't be read any more, while they were in use: make the "
    "pack again, and don't change it while it is used\n";

// Handlers may read only what no lock protects.
struct Mapping {
  std::atomic<uintptr_t> begin{0}, end{0};
};

Mapping mappings[MOST];
struct sigaction before;
std::mutex changing;
std::atomic_flag said = ATOMIC_FLAG_INIT;

void on_bus_error(int, siginfo_t* info, void*) {
  const uintptr_t place = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const Mapping& mapping : mappings)
    if (info->si_code == BUS_ADRERR && mapping.begin.load() <= place && place < mapping.end.load()) {
      // Several threads read a mapping at once: the first of them says it, the others wait for the end.
      if (said.test_and_set()) for (;;) pause();
      if (write(STDERR_FILENO, MESSAGE, sizeof(MESSAGE) - 1)) {}  // there is nothing to do about an error here
      _exit(1);
    }
  sigaction(SIGBUS, &before, nullptr);  // not ours: what failed is tried once more, and ends as it would have
  if (info->si_code <= 0) raise(SIGBUS);  // sent by somebody, so it would not come again
}

}  // namespace

bool watch_mapping(const void* begin, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(changing);
  static bool handling = false;
  if (!handling) {
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    handling = sigaction(SIGBUS, &action, &before) == 0;
  }
  for (Mapping& mapping : mappings)
    if (mapping.begin.load() == 0) {
      mapping.end.store(reinterpret_cast<uintptr_t>(begin) + uintptr_t(bytes));
      mapping.begin.store(reinterpret_cast<uintptr_t>(begin));
      return handling;
    }
  return false;
}

void forget_mapping(const void* begin) {
  const std::lock_guard<std::mutex> lock(changing);
  for (Mapping& mapping : mappings)
    if (mapping.begin.load() == reinterpret_cast<uintptr_t>(begin)) {
      mapping.end.store(0);
      mapping.begin.store(0);
      return;
    }
}

}  // namespace partinfer
