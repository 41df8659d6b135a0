"""The robustness study: which way of fine-tuning keeps what a pretrained model knows."""
