// The kernels as a program of their own, for sanitizers: a line a case, exit status 1 where one of them fails.
//
//     standalone [--order forward|reverse|shuffled] [a part of the names of the cases that are wanted]
#include "simt/standalone.h"

#include <chrono>

namespace standalone {
namespace {

const Op *&first() {
    static const Op *op = nullptr;
    return op;
}

} // namespace

Op::Op(const char *name, void (*run)(const Check &)) : name(name), run(run), next(first()) { first() = this; }

namespace {

int main(int count, char **words) {
    simt::Order order = simt::Order::forward;
    std::string wanted;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word != "--order") {
            wanted = word;
            continue;
        }
        const std::string name = ++i < count ? words[i] : "";
        if (name != "forward" && name != "reverse" && name != "shuffled") {
            std::fprintf(stderr, "standalone: --order must be forward, reverse or shuffled, got '%s'.\n", name.c_str());
            return 2;
        }
        order = name == "forward"   ? simt::Order::forward
                : name == "reverse" ? simt::Order::reverse
                                    : simt::Order::shuffled;
    }
    int cases = 0, failures = 0;
    for (const Op *op = first(); op; op = op->next)
        op->run([&](const std::string &name, const std::function<Finding(simt::Order)> &run) {
            const std::string whole = std::string(op->name) + " " + name;
            if (whole.find(wanted) == std::string::npos)
                return;
            const auto start = std::chrono::steady_clock::now();
            const Finding finding = run(order);
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            ++cases, failures += !finding.empty();
            std::printf("%-8s %s (%.2f s)%s%s\n", finding.empty() ? "ok" : "FAILED", whole.c_str(), seconds.count(),
                        finding.empty() ? "" : ": ", finding.c_str());
            std::fflush(stdout);
        });
    if (!cases) {
        std::fprintf(stderr, "standalone: no case has '%s' in its name.\n", wanted.c_str());
        return 2;
    }
    std::printf("%d cases, %d failed\n", cases, failures);
    return failures != 0;
}

} // namespace
} // namespace standalone

int main(int count, char **words) { return standalone::main(count, words); }
