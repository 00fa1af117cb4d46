"""Volumes and their files (NIfTI, DICOM, NRRD, MetaImage, MGH), geometry, cases and data sets."""
