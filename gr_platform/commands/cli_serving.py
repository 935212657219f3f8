"""The commands of `gr` about the model server: running it and asking it.

Invariant: only light modules are imported here; what a command needs it imports when it is called.
"""

from typing import Annotated

import typer
from rich.console import Console

from gr_platform import settings
from gr_platform.commands import options
from gr_platform.commands.messages import say


def serve(
    grpc_port: options.GrpcPort = 8001,
    http_port: options.HttpPort = 8000,
    metrics_port: options.MetricsPort = 8002,
    attach: options.Attach = None,
) -> None:
    """Run the model server with the deployed pair until Ctrl-C, and keep it answering; prints its addresses.

    Examples: gr serve --grpc-port 9001 | gr serve --attach 10.0.0.7:8001
    """
    from gr_platform.commands import foreground
    from serving.server import Ports

    ports = Ports(grpc=grpc_port, http=http_port, metrics=metrics_port)
    if attach is None:
        foreground.serve_until_signal(settings.home(), ports, say)
    else:
        foreground.watch_until_signal(settings.home(), attach, ports, say)


def recommend(
    user: options.User,
    k: Annotated[int, typer.Option("-k", help="How many items.")] = 10,
    at: options.RequestTime = None,
    server_history: options.ServerHistory = False,
) -> None:
    """Ask the running model server for the best items for a user.

    Example: gr recommend --user 42 -k 10
    """
    from gr_platform.commands import display
    from gr_platform.commands.query import Asker

    with Asker(settings.home()) as asker:
        answer = asker.recommend(user, k, at, server_history=server_history)
        Console().print(display.answer_table(f"Top {k} for user {user}", answer, asker.tasks))
    say(f"{answer.milliseconds:.1f} ms, {answer.cached_tokens} tokens cached; {display.ORDER}")


def score(
    user: options.User,
    items: options.Items,
    at: options.RequestTime = None,
) -> None:
    """Ask the running model server how likely each action of a user on given items is.

    Example: gr score --user 42 --items 17,4,99
    """
    from gr_platform.commands import display
    from gr_platform.commands.query import Asker, split_ids

    with Asker(settings.home()) as asker:
        answer = asker.score(user, split_ids(items), at)
        Console().print(display.answer_table(f"Probabilities for user {user}", answer, asker.tasks))
    say(f"{answer.milliseconds:.1f} ms, {answer.cached_tokens} tokens cached")
