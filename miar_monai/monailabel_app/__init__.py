"""A MONAI Label app: both bundles as tasks of a server, for 3D Slicer, OHIF and other clients.

``miar label-app`` prints this folder. Give a copy of it to ``monailabel start_server --app``, which writes to it. The
modules need MONAI Label; the rest of the package does not import them.
"""
