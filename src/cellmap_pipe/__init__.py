"""Train, predict, score and submit on partly annotated volume electron microscopy."""
