"""One study per paper, in a module of its name that defines STUDY."""
