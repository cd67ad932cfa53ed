"""Registers weights that were trained elsewhere."""

import hashlib
import json

import torch

from tla_service.config.loading import to_yaml
from tla_service.data import EvaluationBatches, load_dataset, split_training
from tla_service.evaluation.suite import measure_accuracy
from tla_service.files import expanded, sha256
from tla_service.inference.detector import Rejector
from tla_service.job import code_version
from tla_service.models import Architecture
from tla_service.models.weights import fit, read_entries
from tla_service.registry.job_settings import ImportSettings
from tla_service.registry.packaging import check_packaging, log_model
from tla_service.runtime import WorkerContext
from tla_service.tracking.connection import check_tracking, open_store, retrying, storing
from tla_service.tracking.runs import FINGERPRINT, RUN_KEY, finish_run, tagged_run
from tla_service.training.rejector import fit_rejector

_METHOD = "imported"


def import_model(settings: ImportSettings) -> tuple[str, float, tuple[str, ...]]:
    """Match weights to a network, fit its detector, measure its clean accuracy, package and register it.

    Returns the version's address, its clean accuracy on the test set, and notes on which of the weights were used.
    """
    path = expanded("file", settings.file)
    entries = read_entries(path)
    check_tracking(settings.tracking)
    dataset = load_dataset(settings.data)
    names = dataset.class_names
    architecture = Architecture.of(settings.model)
    network = architecture.build(len(names), dataset.image_shape)
    found = fit(entries, network, settings.file)
    network.load_state_dict(found.state_dict)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    config = settings.run_config
    check_packaging(config, names, len(dataset.test), network.embedding_size)
    rows = torch.arange(len(dataset.test))
    alone = WorkerContext(device=device)
    batches = EvaluationBatches(dataset.test, rows, alone, batch_size=config.evaluation.batch_size)
    clean_accuracy = measure_accuracy(network, batches, {}, alone, settings.seed)["clean_accuracy"]
    train, validation = split_training(dataset, settings.data.validation_fraction, settings.seed)
    arrays = fit_rejector(network, (dataset.train, train), validation, config, device)
    note = "the validation images may be part of its training data"
    facts = {FINGERPRINT: dataset.fingerprint, "source": settings.source or path.name, "note": note}
    facts |= {"weights_used": "; ".join(found.notes)} if found.notes else {}
    uri, made, experiment = open_store(settings.tracking)
    # The same file has the same run if the same is made of it: weights do not tell a normalization, nor a detector.
    fitted = config.detection.model_dump(mode="json", exclude_defaults=True)
    made_of = json.dumps([config.digest, fitted, architecture.code_sha256, dataset.fingerprint], sort_keys=True)
    key = f"import/{sha256(path)[:16]}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    tags = {f"tla.{name}": value for name, value in facts.items()} | code_version()
    tags |= {RUN_KEY: key, "tla.method": _METHOD}
    run_id = retrying("Opening the run", lambda: tagged_run(made, experiment, RUN_KEY, key, tags)).info.run_id
    # What an evaluation reads of it: the data set above all.
    storing("Storing config.yaml", lambda: made.log_text(run_id, to_yaml(config), "config.yaml"))
    storing("Logging the accuracy", lambda: made.log_metric(run_id, "test/clean_accuracy", clean_accuracy))
    model_uri = log_model(
        uri,
        run_id,
        state_dict=network.cpu().state_dict(),
        config=config,
        class_names=names,
        image_shape=dataset.image_shape,
        example=dataset.test.fetch(rows[:4]).float().div(255).numpy(),
        metrics={"clean_accuracy": clean_accuracy},
        registered_model=settings.name or f"tla-{settings.data.name.replace('_', '-')}",
        facts=facts,
        rejector=Rejector.from_arrays(arrays) if arrays else None,
        method=_METHOD,
        code=architecture.code,
    )
    finish_run(uri, run_id)
    return model_uri, clean_accuracy, found.notes
