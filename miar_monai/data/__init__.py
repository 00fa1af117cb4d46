"""Volumes and their files: NIfTI, DICOM and what else ITK reads, geometry, folders of cases, data sets."""
