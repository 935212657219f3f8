"""A gRPC endpoint that speaks the server's protocol and answers as a test tells it to."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

SCORED = {"SCORES": np.array([[[0.5, 0.25]]], np.float32), "CACHED_TOKENS": np.array([[7]], np.int32)}
LISTED = SCORED | {"ITEMS": np.array([[42]], np.int64)}


def _response(outputs: dict[str, np.ndarray]) -> service_pb2.ModelInferResponse:
    response = service_pb2.ModelInferResponse()
    for name, values in outputs.items():
        datatype = {"f": "FP32", "i": f"INT{8 * values.itemsize}"}[values.dtype.kind]
        response.outputs.add(name=name, datatype=datatype, shape=values.shape)
        response.raw_output_contents.append(values.tobytes())
    return response


class Endpoint(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A gRPC endpoint that answers as told: each of `failures` is the code and text of one refusal before that."""

    def __init__(self) -> None:
        self.requests: list[service_pb2.ModelInferRequest] = []
        self.failures: list[tuple[grpc.StatusCode, str]] = []
        self.outputs = LISTED
        self.item_id_type = "int64"
        self.wait: threading.Event | None = None
        self.cancelled = threading.Event()
        self.started = threading.Event()

    def ModelConfig(self, request, context):
        parameters = {
            "dataset": "shop",
            "item_id_type": self.item_id_type,
            "actions": '["view"]',
            "tasks": '["a", "b"]',
            "model_digest": "d",
        }
        config = model_config_pb2.ModelConfig(name=request.name)
        for key, value in parameters.items():
            config.parameters[key].string_value = value
        return service_pb2.ModelConfigResponse(config=config)

    def ModelInfer(self, request, context):
        self.requests.append(request)
        self.started.set()
        if self.failures:
            context.abort(*self.failures.pop(0))
        if self.wait is not None:
            context.add_callback(self.cancelled.set)
            self.wait.wait(10)
        return _response(self.outputs)

    def tensors(self) -> dict[str, list]:
        """The inputs of the last request as int64 lists, or raw bytes where they are text."""
        request = self.requests[-1]
        return {
            tensor.name: raw
            if tensor.datatype == "BYTES"
            else np.frombuffer(raw, {"INT64": np.int64, "INT32": np.int32}[tensor.datatype]).tolist()
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }


@contextmanager
def serving(servicer: Endpoint, *, num_threads: int = 4) -> Iterator[str]:
    """Yield the address at which `servicer` answers."""
    server = grpc.server(ThreadPoolExecutor(num_threads), options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    if servicer.wait is not None:
        servicer.wait.set()
    server.stop(0).wait()
