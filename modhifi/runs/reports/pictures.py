"""The pictures of a report."""

from __future__ import annotations

from modhifi.artifacts.report import data_uri
from modhifi.data.contact_sheet import contact_sheet
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel


def seen_samples(samples: Samples, loaded: LoadedModel) -> dict[str, str]:
    """The part of a report with the first samples as the model sees them; empty where they are no pictures.

    A model may take tokens, or images of other channels than one or three.
    """
    try:
        return {"contact_sheet": data_uri(contact_sheet(samples, loaded, n=48, tile=64))}
    except ModhifiError:
        return {}
