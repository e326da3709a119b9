"""The paper's measurements, which the commands of ``groupdetr analyze`` ask for."""
