"""Quality beside speed: tables of settings, published tasks, and a model for lm-evaluation-harness."""
