"""Build conversations from a study: tables and scans in, conversation files per split or fold out."""
