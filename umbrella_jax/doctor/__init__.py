"""Check the installation and the devices."""
