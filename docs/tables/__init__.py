"""The programs that write the generated pages, tables and pictures of the documentation."""
