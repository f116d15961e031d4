"""Names and signatures of apex, flash-attn and xformers on evakernels' ops."""
