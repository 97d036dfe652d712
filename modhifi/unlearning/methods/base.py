"""What every unlearning method says of itself, and where it registers."""

from __future__ import annotations

from typing import Protocol

from modhifi.registry import Registry
from modhifi.unlearning.session import EditSession
from modhifi.unlearning.settings import Defaults


class Method(Protocol):
    """A way to make a classifier forget.

    :class:`modhifi.unlearning.reader_edits.ReaderMethod`, :class:`modhifi.unlearning.writer_edits.WriterMethod` and
    :class:`modhifi.unlearning.classifier_edits.ClassifierMethod` make one of a closed form for one operator.
    """

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def source(self) -> str: ...

    def defaults(self, straight: bool) -> Defaults:
        """What applies where nothing is said; ``straight`` as :attr:`modhifi.unlearning.sites.Sites.straight`."""
        ...

    def run(self, session: EditSession) -> None:
        """Edit the session's model in place. Raises ModhifiError where no operator can be edited."""
        ...


METHODS: Registry[Method] = Registry("unlearning method")
