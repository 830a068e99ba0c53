"""KAITO's resources as far as this stack writes them: `kaito.sh/v1beta1` of v0.12, under the field names of its API.

A Workspace with one node has the same fields since v0.6; InferenceSet v1beta1 is on by default since v0.11.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

API_VERSION = "kaito.sh/v1beta1"
NO_BENCHMARK = {"kaito.sh/disable-benchmark": "true"}  # it would hold a replica's readiness back for minutes
WORKSPACE_LABEL = "kaito.sh/workspace"  # of a Workspace's pods
SET_LABEL = "inferenceset.kaito.sh/created-by"  # of the pods of all Workspaces of one InferenceSet
PORT = 5000


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    def written(self) -> dict[str, Any]:
        """As the API server takes it: what is None is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class LabelSelector(_Part):
    """Labels that KAITO gives the nodes it orders, and by which it finds them again."""

    match_labels: dict[str, str]


class PresetOptions(_Part):
    """`model_access_secret`: a Secret of the namespace with the hub's token under HF_TOKEN."""

    model_access_secret: str


class Preset(_Part):
    """The base model: a name of KAITO's catalogue, or OWNER/NAME on the Hugging Face hub."""

    name: str
    preset_options: PresetOptions | None = None


class AdapterSource(_Part):
    """A container image whose folder /data is a PEFT adapter. `name` is what clients put into `model`."""

    name: str
    image: str
    image_pull_secrets: tuple[str, ...] | None = None


class Adapter(_Part):
    """Without `strength`, which KAITO refuses on vLLM."""

    source: AdapterSource


class Inference(_Part):
    """`config`: a ConfigMap of the namespace with inference_config.yaml, which KAITO's webhook reads."""

    preset: Preset
    config: str
    adapters: tuple[Adapter, ...] | None = Field(None, max_length=10)


class VolumeClaim(_Part):
    """A PersistentVolumeClaim of the namespace."""

    claim_name: str


class Volume(_Part):
    """The one kind of Kubernetes' volume sources that is written here."""

    persistent_volume_claim: VolumeClaim


class Data(_Part):
    """Where rows are read, or the adapter is put: a volume, mounted as a whole."""

    volume_source: Volume


class Tuning(_Part):
    """`config`: a ConfigMap of the namespace with training_config.yaml, which KAITO's webhook reads."""

    preset: Preset
    method: Literal["lora", "qlora"]
    config: str
    input: Data
    output: Data


class WorkspaceResource(_Part):
    """One node of this VM size."""

    instance_type: str
    label_selector: LabelSelector


class Workspace(_Part):
    """Its own fields; KAITO has no `spec` here. One of the two: it serves, or it tunes."""

    resource: WorkspaceResource
    inference: Inference | None = None
    tuning: Tuning | None = None


class SetResource(_Part):
    """The VM size of each replica's node."""

    instance_type: str


class SetTemplate(_Part):
    """What each replica's Workspace is. A change of it does not reach Workspaces that are there."""

    resource: SetResource
    inference: Inference


class InferenceSetSpec(_Part):
    """As many Workspaces as `replicas`. No `nodeCountLimit`: nothing in v0.12 reads it."""

    replicas: int = Field(ge=0)
    label_selector: LabelSelector
    template: SetTemplate
