"""LoRA methods as instances of bilevel problems, and what they stand on."""
