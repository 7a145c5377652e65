//! The actors of Volary: supervisor, node, lane, dense, router, expert, reducer, checkpointer.
