"""Parts of the trainers of the bundled tiny checkpoints: documents, packing, model, batched forward, loop, evaluation."""
