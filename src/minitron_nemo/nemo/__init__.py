"""NeMo 2.x: models, trainer, optimizer, callbacks, context. Nothing else imports nemo or lightning."""
