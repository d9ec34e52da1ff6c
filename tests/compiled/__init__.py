"""Programs that the tests run in processes where Triton compiles instead of interpreting."""
