"""Model families, built from layers that know neither rank, nor number format, nor device."""
