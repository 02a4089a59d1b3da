"""Files of callbacks in the processes that write none."""

from pathlib import Path

from partita.keras.saving import log_aside


class Logger:
    """Keras's TensorBoard, as far as its folder goes."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir

    def set_model(self, model: object) -> None:
        Path(self.log_dir).mkdir(exist_ok=True)
        (Path(self.log_dir) / "events").write_text(str(model))

    def on_train_end(self, logs: object = None) -> None:
        assert (Path(self.log_dir) / "events").exists()


def test_a_logger_writes_aside_and_leaves_nothing(tmp_path: Path) -> None:
    logger = Logger(str(tmp_path / "logs"))
    log_aside(Logger)
    logger.set_model("model")
    aside = Path(logger.log_dir)
    assert aside.is_dir() and aside != tmp_path / "logs"
    logger.on_train_end()
    assert not aside.exists() and not (tmp_path / "logs").exists()
