"""The usual door to domain XML: reading it, the changes that most need, and showing a domain as it.

What is behind it: `definition` (what a text asks for), `elements` (what is used, kept and refused), `domcheck` and
`domdevices` (the rules), `domedit` and `devedit` (changes to a text), `describe` (texts of running domains).
"""

from virtvmand.definition import NAMESPACE, Definition, Plan, known_definition, read_definition
from virtvmand.describe import domain_xml, synthesized
from virtvmand.domedit import metadata, with_memory, with_metadata, with_name, with_vcpus

__all__ = [
    "NAMESPACE",
    "Definition",
    "Plan",
    "domain_xml",
    "known_definition",
    "metadata",
    "read_definition",
    "synthesized",
    "with_memory",
    "with_metadata",
    "with_name",
    "with_vcpus",
]
