"""A MONAI Label app: both bundles as tasks of a server, for 3D Slicer, OHIF and whatever else speaks to one.

``miar label-app`` prints this folder, which ``monailabel start_server --app`` takes, best as a copy: it writes there.
The modules need MONAI Label; nothing else of the package imports them.
"""
