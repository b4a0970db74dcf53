"""The engine's process: `python -m twostroke_engine.process --fd N`, a child of a worker service.

N is one end of a socket pair. The first frame is an `EngineConfig`, answered by `EngineReady` or `EngineFailed`; then
inbox messages come in and outbox messages go out. The end of the stream ends the process at once, whatever its threads
are doing: an engine without a service is of no use to anyone.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import monotonic

import msgspec
import torch

from twostroke_engine.config import EngineConfig
from twostroke_engine.engine import Engine
from twostroke_engine.framing import frame, read_frame
from twostroke_engine.loop import EngineLoop
from twostroke_engine.messages import EngineFailed, EngineReady, InboxMessage, OutboxMessage
from twostroke_engine.model.config import ModelError
from twostroke_engine.runner.model_runner import LoadedModel, build_runner
from twostroke_engine.transfer.channel import ChannelFactory
from twostroke_engine.transfer.context import TransferContext
from twostroke_engine.transfer.end import ReceivingEnd, SendingEnd, TransferEnd
from twostroke_engine.transfer.receiver import KVReceiver
from twostroke_engine.transfer.schemes import channel_factory, scheme_names
from twostroke_engine.transfer.sender import KVSender
from twostroke_engine.transfer.wire import check_wish
from twostroke_engine.weights.fingerprint import tokenizer_hash

log = logging.getLogger(__name__)


class Outbox:
    """Writes messages in a thread of its own: a step never waits for the service to read."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._messages: SimpleQueue[OutboxMessage | None] = SimpleQueue()
        self._thread = Thread(target=self._write, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: OutboxMessage) -> None:
        """Any thread: queues a message."""
        self._messages.put(message)

    def close(self) -> None:
        """Returns when everything was written."""
        self._messages.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._connection.sendall(frame(message))
            except OSError:
                return  # the service is gone, and the reader ends the process


def assemble(config: EngineConfig, outbox: Callable[[OutboxMessage], None]) -> tuple[EngineLoop, EngineReady]:
    """Loads the model and puts an engine, its transfer ends and their loop together.

    Raises:
        ModelError: anything that the user can put right; one line.
    """
    torch.set_num_threads(config.num_threads)
    names = scheme_names(config.device.partition(":")[0], config.channels)  # an error is better told before loading
    model = build_runner(config, compiles_ahead=True)
    config = msgspec.structs.replace(config, max_model_len=model.max_model_len)
    engine = Engine(config, model.spec, model.num_blocks, model.runner, model.eos_token_ids, monotonic)
    pool = model.runner.kv_pool
    channels = channel_factory(pool.device, config.transfer_host, config.transfer_timeout_s, names, pool)
    tokenizer = tokenizer_hash(Path(config.model_dir))
    sender, receiver = _transfer_ends(config, model, tokenizer, engine, channels, lambda: loop.wake())
    ends: list[TransferEnd] = [end for end in (sender, receiver) if end is not None]
    loop = EngineLoop(engine, ends, sender, receiver, outbox)
    ready = EngineReady(
        kv_spec=model.spec,
        num_blocks=model.num_blocks,
        max_model_len=engine.max_model_len,
        model_fingerprint=model.model_fingerprint,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        channels=channels.abilities,
        tokenizer_hash=tokenizer,
    )
    return loop, ready


def _transfer_ends(
    config: EngineConfig,
    model: LoadedModel,
    tokenizer: str,
    engine: Engine,
    channels: ChannelFactory,
    wake: Callable[[], None],
) -> tuple[SendingEnd | None, ReceivingEnd | None]:
    check_wish(config.transfer_dtype, model.spec)
    context = TransferContext(
        pool=model.runner.kv_pool,
        backend=model.runner.backend,
        spec=model.spec,
        worker_id=config.worker_id,
        worker_epoch=config.worker_epoch,
        model_fingerprint=model.model_fingerprint,
        channels=channels,
        timeout_s=config.transfer_timeout_s,
        layers_per_segment=config.transfer_layers,
        tokenizer_hash=tokenizer,
        transfer_dtype=config.transfer_dtype,
    )
    sender = KVSender(context, engine, wake) if config.sends_kv else None
    receiver = KVReceiver(context, engine, wake) if config.receives_kv else None
    return sender, receiver


def freeze_heap() -> None:
    """Once a model is loaded: spares the garbage collector what stays as long as the process does.

    Libraries and the model are some million objects. A full collection that looks at all of them takes a fifth of a
    second, in which every stream waits for its next token.
    """
    gc.collect()
    gc.freeze()


def serve(connection: socket.socket) -> int:
    """Runs an engine until its loop ends; the exit code. The end of the stream never gets here: it ends the process."""
    payload = read_frame(connection)
    if payload is None:
        return 0
    outbox = Outbox(connection)
    built: Future[EngineLoop] = Future()
    Thread(target=_read, args=(connection, built), name="inbox", daemon=True).start()
    try:
        loop, ready = assemble(msgspec.msgpack.decode(payload, type=EngineConfig), outbox.put)
    except ModelError as error:
        return _give_up(outbox, str(error))
    except Exception as error:
        # The process's boundary: the service gets one line, the log the rest.
        log.exception("the engine cannot start")
        return _give_up(outbox, f"the engine cannot start: {type(error).__name__}: {error}")
    freeze_heap()
    outbox.put(ready)
    loop.start()
    built.set_result(loop)
    loop.join()
    outbox.close()
    return int(loop.failed)


def _give_up(outbox: Outbox, message: str) -> int:
    outbox.put(EngineFailed(message=" ".join(message.split())))
    outbox.close()
    return 1


def _read(connection: socket.socket, built: Future[EngineLoop]) -> None:
    """Posts what the service says, once there is a loop; ends the process with the stream, even while a model loads."""
    decoder: msgspec.msgpack.Decoder[InboxMessage] = msgspec.msgpack.Decoder(InboxMessage)
    try:
        while (payload := read_frame(connection)) is not None:
            built.result().post(decoder.decode(payload))
    except OSError:
        log.info("the service's socket broke")
    except msgspec.DecodeError:
        log.exception("the service sent what is no message")
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Parses `--fd`, serves, and exits without waiting for any thread."""
    parser = argparse.ArgumentParser(prog="twostroke-engine")
    parser.add_argument("--fd", type=int, required=True, help="one end of a socket pair, inherited")
    fd = parser.parse_args().fd
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Ctrl-C is for the service, which drains and then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = serve(socket.socket(fileno=fd))
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main()
