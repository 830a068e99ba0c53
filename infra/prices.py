"""What Azure charges by the hour at its list prices, each dated and with its source; a stack's settings override them.

Virtual machines are in prices.csv, by size and region. What they are not: an offer. Contracts, reservations, savings
plans and taxes make another price, and spot prices change by the hour.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.settings import Prices

HOURS_A_MONTH = 730
CURRENCY = "USD"
TABLE = Path(__file__).with_suffix(".csv")
AS_OF = "2026-06-18"
"""Day of prices.csv."""
DEFAULT_REGION = "eastus"

SPOT_SHARE = 0.1848
"""Of the pay-as-you-go price, for GPU sizes. No whole list of Azure's spot prices was found, but those seen had this
ratio: Standard_NC128ds_xl_RTXPRO6000BSE_v6 in eastus and centralus 1.179024 of 6.38 (2026-10-29, the data set
datameaning/azure-gpu-vm-prices); by notes of 2026-08-16 Standard_NC24ads_A100_v4 0.68 of 3.67 and
Standard_NCC40ads_H100_v5 1.64 of 8.90. It may rise to the whole price."""

# What follows is of East US or West Europe, where they are alike; other regions differ by some percent. From the
# expected outputs of infracost's tests, which ask Azure's prices (2024-07 to 2026-04), where no other source is named.
AKS_TIER = {"Free": 0.0, "Standard": 0.10, "Premium": 0.60}
"""An hour of control plane. Premium's is from memory: no dated source was found."""
NAT_GATEWAY = 0.045
PUBLIC_IP = 0.005
LOAD_BALANCER = 0.025
"""Standard, with up to five rules: c3x.dev/resources/azure/azurerm_lb, read in 2026-11."""
PRIVATE_ENDPOINT = 0.01
DNS_ZONE = 0.50 / HOURS_A_MONTH
REGISTRY = {"Standard": 0.667 / 24, "Premium": 1.667 / 24}
"""Its day: c3x.dev/resources/azure/azurerm_container_registry, read in 2026-11. 100 and 500 GiB are included."""
BLOB_GIB = {"LRS": 0.0208 / HOURS_A_MONTH, "ZRS": 0.026 / HOURS_A_MONTH}
"""Hot tier, a GiB."""
PREMIUM_SSD = {
    gib: usd / HOURS_A_MONTH
    for gib, usd in ((64, 10.21), (128, 19.71), (256, 38.02), (512, 73.22), (1024, 135.17), (2048, 259.05))
}
"""A managed disk of up to so many GiB, P6 to P40, locally redundant. P10 is infracost's; the others are from memory: no
dated source was found."""


@dataclass(frozen=True)
class VmPrice:
    """`usd` an hour, and where the price is from: a region, or the setting that gave it."""

    usd: float
    source: str


def vm_price(size: str, location: str, *, spot: bool, given: Prices) -> VmPrice:
    """The hourly price of `size`: the settings' own, else the list's in `location`, else the list's elsewhere.

    Raises ValueError, which names the setting to give, for a size that neither has.
    """
    size, key = size.lower(), "spot_usd_per_hour" if spot else "usd_per_hour"
    own: dict[str, float] = {name.lower(): usd for name, usd in getattr(given, key).items()}
    if size in own:
        return VmPrice(own[size], f"prices.{key}")
    if size not in table():
        raise ValueError(f"no list price is known here; give yours as prices.{key}")
    usd, region = list_price(size, location)
    # Given alone, the pay-as-you-go price says nothing of spot: that discount is on Azure's own list.
    return VmPrice(usd * (SPOT_SHARE if spot else 1), region)


def list_price(size: str, location: str = DEFAULT_REGION) -> tuple[float, str]:
    """USD an hour of `size`, pay as you go, and the region: `location`, else East US, else the first that sells it.

    Raises KeyError for a size that is not in the table.
    """
    found = table()[size.lower()]
    region = next((name for name in (region_name(location), DEFAULT_REGION) if name in found), next(iter(found)))
    return found[region], region


def region_name(location: str) -> str:
    """`West Europe`, as Azure also takes it, is `westeurope`."""
    return location.lower().replace(" ", "")


def disk_price(gib: int) -> float:
    """An hour of the smallest Premium SSD that holds `gib` GiB; ValueError beyond the largest."""
    return PREMIUM_SSD[min(size for size in PREMIUM_SSD if size >= gib)]


@functools.cache
def table() -> dict[str, dict[str, float]]:
    """USD an hour by size (in lower case) and region, without the regions that lack it; as of `AS_OF`."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return {
        row.pop("size").lower(): {region: float(usd) for region, usd in row.items() if usd}
        for row in csv.DictReader(lines)
    }
