"""`fovea lab`: faults are injected into real runs; what happens is compared with what the documentation promises."""
