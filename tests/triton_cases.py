"""Triton's interpreter as the tests run it."""

import dataclasses
import functools


@functools.cache
def quicken():
    """Have it leave out half of its work, which changes no result: at every call of a function inside a kernel it makes
    ``triton.language`` its own once more, though the launch around the call has; and beside every operation on 32-bit
    numbers it does the same on 64-bit ones, for an assertion that is off."""
    from triton.runtime import interpreter

    seen = set()

    def call(function, *arguments, **constants):
        module = function.fn.__module__
        if module not in seen:  # Triton's own functions have another name for the language, which stays changed
            seen.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **constants)

    interpreter.InterpretedFunction.__call__ = call
    set_options(sanitize_overflow=False)


def set_options(**changed):
    """Set some of the interpreter's options; returns them as they were."""
    from triton.runtime.interpreter import interpreter_builder

    before = interpreter_builder.options
    interpreter_builder.options = dataclasses.replace(before, **changed)
    return {name: getattr(before, name) for name in changed}
