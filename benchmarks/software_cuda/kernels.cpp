// The kernels' names, and the software version of each.
#include "kernels.h"

#include <cxxabi.h>

#include <cstdlib>
#include <map>

namespace software_cuda {
namespace {

std::map<std::string, std::function<Kernel(const Templates &)>> & families() {
    static auto & all = *new std::map<std::string, std::function<Kernel(const Templates &)>>;
    return all;
}

// Where the bracket opens that the last character of a text closes.
std::size_t opening(const std::string & text, char open, char close) {
    int depth = 0;
    for (std::size_t i = text.size(); i-- > 0;) {
        depth += text[i] == close ? 1 : text[i] == open ? -1 : 0;
        if (depth == 0) {
            return i;
        }
    }
    return std::string::npos;
}

}  // namespace

Templates split(const std::string & list) {
    Templates parts(1);
    int depth = 0;
    for (const char each : list) {
        depth += each == '<' || each == '(' ? 1 : each == '>' || each == ')' ? -1 : 0;
        if (each == ',' && depth == 0) {
            parts.emplace_back();
        } else if (each != ' ' || !parts.back().empty()) {
            parts.back() += each;
        }
    }
    return parts;
}

int enumerator(const std::string & text) { return std::stoi(text.substr(text.find(')') + 1)); }

std::string between(const std::string & text, const std::string & first, const std::string & last) {
    const std::size_t start = text.find(first);
    if (start == std::string::npos) {
        return {};
    }
    return text.substr(start + first.size(), text.find(last, start) - start - first.size());
}

Family::Family(const std::string & name, std::function<Kernel(const Templates &)> make) {
    families()[name] = std::move(make);
}

std::string demangled(const char * name) {
    int status = 0;
    char * text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
    const std::string result = status == 0 ? text : name;
    std::free(text);
    return result;
}

Name parse_name(const std::string & demangled) {
    const std::size_t parameters = opening(demangled, '(', ')');
    Name name{demangled.substr(0, parameters), {}, demangled.substr(parameters)};
    if (!name.base.empty() && name.base.back() == '>') {
        const std::size_t templates = opening(name.base, '<', '>');
        name.templates = split(name.base.substr(templates + 1, name.base.size() - templates - 2));
        name.base.resize(templates);
    }
    name.base = name.base.substr(name.base.rfind(' ') + 1);
    return name;
}

Kernel find_kernel(const std::string & demangled) {
    const Name name = parse_name(demangled);
    const auto family = families().find(name.base);
    if (family == families().end()) {
        return {};
    }
    Kernel found = family->second(name.templates);
    if (found.bind && found.parameters != name.parameters) {
        fault("the parameters of " + demangled + " are " + name.parameters + "; known are " + found.parameters);
    }
    return found;
}

}  // namespace software_cuda
