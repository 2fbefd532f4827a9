"""The commands beside `pretrain`, a module each; every one is imported only when it is asked for."""
