"""Device code: everything that Triton compiles. Imported when a kernel is first launched, never by `import glomo`."""
