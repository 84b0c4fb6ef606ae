"""A stand-in for the module `spaces` of a ZeroGPU Space, for a process of its own.

As there, a decorated function runs in a fork: its arguments and its results are pickled, and after
the launch only the forks have the networks' weights. A launch without a decorated function that an
event uses is an error. SPACES_LOG gets one JSON object a line: the launch, then every call.
"""

import functools
import gc
import inspect
import json
import multiprocessing
import os
import pickle
import sys

assert "torch" not in sys.modules, "import spaces first"
decorated = []
weights = []  # (parameter, its values), of which the main process keeps none


def log(**entry):
    """Append an entry to the log."""
    with open(os.environ["SPACES_LOG"], "a") as file:
        file.write(json.dumps(entry) + "\n")


def gradio_auto_wrap(function):
    """Return the function, which Gradio asks for of everything."""
    return function


def run(connection, function, request):
    """Send the pickled results of a call, one by one, and at the end None."""
    import torch

    torch.set_num_threads(1)  # no pool of threads survives a fork
    for parameter, values in weights:
        parameter.data.copy_(values)
    args, kwargs = pickle.loads(request)
    try:
        results = function(*args, **kwargs)
        for result in results if inspect.isgeneratorfunction(function) else [results]:
            connection.send_bytes(pickle.dumps((True, result)))
    except Exception as error:
        connection.send_bytes(pickle.dumps((False, error)))
    connection.send_bytes(pickle.dumps(None))


def results_of_fork(function, duration, args, kwargs):
    """Yield what a function returns or yields in a fork of this process."""
    request = pickle.dumps((args, kwargs))
    log(call=function.__name__, duration=duration(*args, **kwargs))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run, args=(sender, function, request), daemon=True)
    process.start()
    sender.close()
    while (received := pickle.loads(receiver.recv_bytes())) is not None:
        is_result, value = received
        if not is_result:
            raise value
        yield value
    process.join()


def GPU(duration):  # noqa: N802
    """Return the decorator of functions that need the GPU for a duration, in seconds."""

    def decorate(function):
        @functools.wraps(function)
        def generate(*args, **kwargs):
            yield from results_of_fork(function, duration, args, kwargs)

        @functools.wraps(function)
        def call(*args, **kwargs):
            (result,) = results_of_fork(function, duration, args, kwargs)
            return result

        wrapped = generate if inspect.isgeneratorfunction(function) else call
        decorated.append(wrapped)
        patch_launch()
        return wrapped

    return decorate


@functools.cache
def patch_launch():
    """Make a launch check the events and take the weights."""
    import gradio
    import torch

    launch = gradio.Blocks.launch

    def launch_on_zero_gpu(demo, *args, **kwargs):
        bound = [event.fn.__name__ for event in demo.fns.values() if event.fn in decorated]
        assert bound, "No @spaces.GPU function detected during startup"
        log(bound=sorted(bound))
        modules = [item for item in gc.get_objects() if isinstance(item, torch.nn.Module)]
        unique = {id(p): p for module in modules for p in module.parameters(recurse=False)}
        for parameter in unique.values():
            weights.append((parameter, parameter.data.clone()))
            parameter.data.zero_()
        return launch(demo, *args, **kwargs)

    gradio.Blocks.launch = launch_on_zero_gpu
