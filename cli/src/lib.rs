//! The binary volary: configuration and commands.
